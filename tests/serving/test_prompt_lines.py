"""Lines to lines: what is read, how many run at a time, in which order they are written."""

import io
import json
import threading
import time

import pytest

from tests.serving.test_client_requests import MISSING_KEYS, NO_OBJECTS
from vivace.serving import client as library
from vivace.serving import prompt_lines
from vivace.serving.client import Event, Usage
from vivace.serving.prompt_lines import WINDOW, Item, read_items, run

USAGE = Usage(1, 0, 1, 0.0, 0.0, 0.0, 0)


def event(text, index=0, *, is_last=True):
    return Event(
        request_id="x",
        text=text,
        token_ids=(),
        logprobs=(),
        prompt_logprobs=(),
        finish_reason="stop" if is_last else None,
        stop_reason=None,
        usage=USAGE if is_last else None,
        index=index,
    )


class Client:
    """Answers when it is let."""

    def __init__(self, answer):
        self._answer = answer
        self.asked = []
        self.is_closed = False

    def generate(self, prompt, **params):
        self.asked.append((prompt, params))
        return self._answer(prompt)

    def close(self):
        self.is_closed = True


def items(*prompts):
    return read_items([f"{prompt}\n".encode() for prompt in prompts], {})


def records(out):
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_as_many_run_at_a_time_as_were_asked_for_and_no_more():
    barrier = threading.Barrier(4)
    running, most = [], []

    def answer(prompt):
        running.append(prompt)
        barrier.wait(10)  # four have come
        most.append(len(running))
        barrier.wait(10)
        running.remove(prompt)
        yield event(prompt)

    out = io.StringIO()
    assert run(Client(answer), items(*"abcdefgh"), out, concurrency=4) == 0
    assert set(most) == {4}
    assert [record["text"] for record in records(out)] == list("abcdefgh")


def test_a_long_one_holds_back_what_is_written_and_not_what_runs():
    others = threading.Semaphore(0)
    count = 2 * WINDOW - 1

    def answer(prompt):
        if prompt == "long":
            for _ in range(count):
                assert others.acquire(timeout=10)
        else:
            others.release()
        yield event(prompt)

    out = io.StringIO()
    names = ["long", *map(str, range(count))]
    assert run(Client(answer), items(*names), out, concurrency=2) == 0
    assert [record["index"] for record in records(out)] == list(range(count + 1))


def test_a_line_is_written_before_the_next_one_is_read():
    """As a program at the other end of two pipes needs it."""
    out = io.StringIO()
    written = threading.Event()
    out.flush = written.set

    def lines():
        yield b"one\n"
        assert written.wait(10)
        yield b"two\n"

    client = Client(lambda prompt: [event(prompt)])
    assert run(client, read_items(lines(), {}), out, concurrency=8) == 0
    assert len(records(out)) == 2


def test_several_replies_stand_in_their_order():
    pieces = [event("B", 1), event("a", is_last=False), event("A")]
    out = io.StringIO()
    run(Client(lambda prompt: pieces), items("x"), out, concurrency=1)
    [record] = records(out)
    assert record["text"] == "aA"
    assert [reply["text"] for reply in record["replies"]] == ["aA", "B"]


def test_whoever_is_interrupted_closes_the_client_and_writes_no_more():
    asked, release = threading.Event(), threading.Event()
    out = io.StringIO()

    def answer(prompt):
        asked.set()
        assert release.wait(10)
        yield event(prompt)

    class Interrupted(Client):
        def close(self):
            super().close()
            release.set()

    def lines():
        yield b"one\n"
        assert asked.wait(10)
        time.sleep(0.05)  # by now its answer is waited for, to be written
        raise KeyboardInterrupt

    client = Interrupted(answer)
    with pytest.raises(KeyboardInterrupt):
        run(client, read_items(lines(), {}), out, concurrency=1)
    assert client.is_closed and out.getvalue() == ""


def test_an_output_that_breaks_ends_whoever_waits_for_it():
    window = 2 * WINDOW
    all_are_asked = threading.Event()

    def answer(prompt):
        if len(client.asked) == window:
            all_are_asked.set()
        yield event(prompt)

    class Broken(io.StringIO):
        def write(self, text):
            assert all_are_asked.wait(10)
            raise BrokenPipeError

    client = Client(answer)
    endless = (b"x\n" for _ in iter(int, 1))
    with pytest.raises(BrokenPipeError):
        run(client, read_items(endless, {}), Broken(), concurrency=2)
    assert client.is_closed and len(client.asked) <= window + 1


def test_a_slot_that_a_broken_output_frees_is_not_taken_for_a_new_line(monkeypatch):
    """Whoever waited for it is woken while the writer is still about to end."""

    class Slots(threading.Semaphore):
        def release(self, n=1):
            super().release(n)
            time.sleep(0.3)

    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    ends = []

    def ask():
        endless = (b"x\n" for _ in iter(int, 1))
        try:
            run(Client(lambda _: [event("")]), read_items(endless, {}), Broken(), concurrency=1)
        except BrokenPipeError as error:
            ends.append(error)

    monkeypatch.setattr(prompt_lines, "Semaphore", Slots)
    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(10)
    assert ends


def test_the_lines_parameters_go_before_the_commands():
    [item] = read_items([b'{"prompt": "x", "seed": 2}'], {"seed": 1, "top_k": 3})
    assert item == Item(0, {"prompt": "x"}, {"seed": 2, "top_k": 3})


def test_a_plain_line_is_taken_as_it_is_without_its_end():
    lines = [b" a b \r\n", b"\n", b"  \n", '"ü"\n'.encode(), b"[1]\n"]
    assert [(one.index, one.asked) for one in read_items(lines, {})] == [
        (0, {"prompt": " a b "}),
        (3, {"prompt": '"ü"'}),
        (4, {"prompt": "[1]"}),
    ]


@pytest.mark.parametrize(
    ("line", "text"),
    [
        (b'{"prompt": 1', "line 1: not JSON: "),
        (b'{"prompt": "x"} {"prompt": "y"}', "line 1: not JSON: Extra data"),
        (b"{" + b'"a":[' * 100_000, "line 1: "),
        (b"\xff", "line 1: 'utf-8' codec"),
        (b'{"prompt": "\\ud800"}', "line 1: 'utf-8' codec"),
        (b'{"prompt": "x", "temperature": NaN}', "line 1: NaN is not JSON"),
        (b"{}", "line 1: one of prompt and messages must be set"),
        (b'{"prompt": "x", "messages": []}', "line 1: one of prompt and messages"),
        (b'{"prompt": 5}', "line 1: prompt must be a text or a list of token ids, got 5"),
        (b'{"prompt": [true]}', "line 1: prompt must be"),
        (b'{"messages": "x"}', "line 1: messages must be a list of objects, got 'x'"),
        (b'{"messages": ["ab"]}', "line 1: messages must be a list of objects"),
        (b'{"prompt": "x", "seed": "y"}', "line 1: seed must be a whole number, got 'y'"),
    ],
)
def test_a_line_that_cannot_be_asked_is_an_error_of_its_own(line, text):
    [item] = read_items([line], {})
    assert item.problem.startswith(text)
    out = io.StringIO()
    client = Client(lambda prompt: [event(prompt)])
    assert run(client, [item, *items("good")], out, concurrency=2) == 1
    bad, good = records(out)
    assert bad == {"index": 0, "error": {"code": "INVALID_ARGUMENT", "message": item.problem}}
    assert good["text"] == "good" and len(client.asked) == 1


@pytest.mark.parametrize(("message", "words"), [*MISSING_KEYS, *NO_OBJECTS])
def test_a_message_that_the_client_refuses_is_an_error_of_its_line(fake, message, words):
    lines = [json.dumps({"messages": [message]}).encode(), b"good"]
    out = io.StringIO()
    with library.Client(fake.target) as client:
        assert run(client, read_items(lines, {}), out, concurrency=1) == 1
    bad, good = records(out)
    assert bad["error"]["code"] == "INVALID_ARGUMENT" and words in bad["error"]["message"]
    assert good["text"] == "ab"


def test_what_protobuf_cannot_hold_is_an_error_of_its_line():
    def refuse(prompt):
        raise ValueError("Value out of range: 9")

    out = io.StringIO()
    assert run(Client(refuse), items("x"), out, concurrency=1) == 1
    assert records(out)[0]["error"]["message"] == "line 1: Value out of range: 9"
