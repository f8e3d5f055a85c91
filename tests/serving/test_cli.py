"""The commands as people use them: what they print, how they end."""

import json
import os
import pty
import re
import signal
import subprocess
import sys

import pytest

from tests.serving.server_process import MODEL, engine_pids, is_gone, wait_until
from vivace.serving import cli

VIVACE = (sys.executable, "-P", "-m", "vivace")


def run(*words, **options):
    return subprocess.run(
        [*VIVACE, *words], capture_output=True, text=True, timeout=60, check=False, **options
    )


@pytest.mark.parametrize("command", ["serve", "generate", "chat"])
def test_help_names_every_flag_and_what_it_does(command, capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(command, ["--help"])
    text = capsys.readouterr().out
    assert end.value.code == 0 and text.startswith(f"usage: vivace {command}")
    flags = text[text.index("options:") :].split("\n  -")[1:]
    assert len(flags) > 8
    for flag in flags:
        words = re.sub(r"\{.*?\}|-[-\w]+|\b[A-Z_]+\b", "", flag).split()
        assert len(words) >= 3, flag


def test_generate_prints_the_prompt_and_what_follows_it(server, client):
    prompt = "Once upon"
    want = "".join(event.text for event in client.generate(prompt, temperature=0, max_tokens=12))
    words = ("generate", prompt, "--temperature", "0", "--max-tokens", "12")
    done = run(*words, "--target", server.target)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{prompt}{want}\n", "")


def test_a_refusal_is_one_line_with_the_servers_words(server):
    done = run("generate", "x", "--temperature", "9", "--target", server.target)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("vivace: error: INVALID_ARGUMENT: temperature")


def test_no_server_is_one_line():
    done = run("generate", "x", "--target", "127.0.0.1:1")
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1 and "UNAVAILABLE" in done.stderr


def test_a_refused_message_does_not_end_the_chat(server):
    done = run("chat", "--temperature", "9", "--target", server.target, input="one\ntwo\n")
    assert done.returncode == 1
    assert done.stderr.count("vivace: error: INVALID_ARGUMENT: temperature") == 2


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["generate", b"\xff"], "prompt"),
        (["generate", "x", "--stop", b"\xff"], "stop"),
        (["chat", "--system", b"\xff"], "system"),
    ],
)
@pytest.mark.parametrize("locale", ["C.UTF-8", "POSIX"])
def test_bytes_that_are_no_text_are_one_line(words, name, locale):
    words = [*VIVACE, *words, "--target", "127.0.0.1:1"]
    env = {**os.environ, "LC_ALL": locale}
    done = subprocess.run(words, capture_output=True, timeout=60, check=False, env=env, input=b"")
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (1, b"", 1)
    assert done.stderr.startswith(f"vivace: error: {name} must be UTF-8".encode())


def test_a_system_message_of_bytes_that_are_no_text_is_one_line(tmp_path):
    (tmp_path / "system").write_bytes(b"\xff")
    done = run("chat", "--system", str(tmp_path / "system"))
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "UTF-8" in done.stderr


@pytest.mark.parametrize("mode", ["0", "1"])
def test_a_line_that_is_no_text_does_not_end_the_chat(server, mode):
    words = (*VIVACE, "chat", "--max-tokens", "4", "--ignore-eos", "--target", server.target)
    env = {**os.environ, "PYTHONUTF8": mode, "LC_ALL": "C.UTF-8"}
    lines = b"\xff\nHello\n"
    done = subprocess.run(words, capture_output=True, timeout=60, check=False, env=env, input=lines)
    assert done.returncode == 0
    assert done.stderr.count(b"\n") == 1
    assert done.stderr.startswith(b"vivace: error: the message must be UTF-8")
    assert len(done.stdout) > len("> > \n> \n")


def test_a_chat_remembers_what_was_said(server, client):
    first = {"role": "user", "content": "How long does delivery take?"}
    second = {"role": "user", "content": "And a refund?"}

    def reply(messages):
        return "".join(e.text for e in client.chat(messages, temperature=0, max_tokens=40))

    system = {"role": "system", "content": "Be brief."}
    one = reply([system, first])
    two = reply([system, first, {"role": "assistant", "content": one}, second])
    words = ("chat", "--system", "Be brief.", "--temperature", "0", "--max-tokens", "40")
    lines = f"{first['content']}\n{second['content']}\n"
    done = run(*words, "--target", server.target, input=lines)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"> {one}\n> {two}\n> \n"


def test_ctrl_c_ends_a_reply_and_the_chat_goes_on_with_what_was_said(server, client):
    """On a terminal of its own."""
    terminal, inside = pty.openpty()
    words = (*VIVACE, "chat", "--min-tokens", "1900", "--target", server.target)
    before = len(server.errors)
    chat = subprocess.Popen(words, stdin=inside, stdout=inside, stderr=inside)
    os.close(inside)
    try:
        shown = Shown(terminal)
        shown.wait("> ")
        for number, line in enumerate((b"Hello\n", b"And now?\n"), 1):
            os.write(terminal, line)
            shown.wait(line.decode().strip())
            for _ in range(9):
                shown.wait(" ")  # between words of the reply
            chat.send_signal(signal.SIGINT)
            shown.wait("[cancelled]")
            shown.wait("> ")
            wait_until(lambda: len(chats(server.errors[before:])) == number)  # noqa: B023
        os.write(terminal, b"\x04")
        assert chat.wait(10) == 0
    finally:
        chat.kill()
        chat.wait()
        os.close(terminal)
    first, second = chats(server.errors[before:])
    assert first["code"] == second["code"] == "CANCELLED"
    reply = shown.text.replace("\r", "").partition("Hello\n")[2].partition(" [cancelled]")[0]
    assert reply.count(" ") >= 9
    said = second["prompt_tokens"] - first["prompt_tokens"]
    added = [client.tokenize(text, add_special_tokens=False) for text in (reply, "And now?")]
    assert said >= sum(len(one.token_ids) for one in added)


def chats(lines):
    """What the server's log says of calls of Chat."""
    entries = [json.loads(line) for line in lines if line.startswith("{")]
    return [entry for entry in entries if entry["rpc"] == "Chat"]


LINES = """Hello

{"prompt": "Hi", "max_tokens": 3, "seed": 5, "logprobs": 1}
{"prompt": [5, 6, 7], "stop": "no such text"}
{bad
{"messages": [{"role": "user", "content": "Hello"}], "temperature": 9}
{"messages": [{"role": "user", "content": "Hello"}]}
"""


def test_lines_are_answered_in_their_order_and_those_that_fail_fail_alone(server, client, tmp_path):
    (tmp_path / "in").write_text(LINES)
    words = ("generate", "--input", str(tmp_path / "in"), "--output", str(tmp_path / "out"))
    done = run(*words, "--temperature", "0", "--max-tokens", "8", "--target", server.target)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")
    records = [json.loads(line) for line in (tmp_path / "out").read_text().splitlines()]
    assert [record["index"] for record in records] == [0, 2, 3, 4, 5, 6]
    params = {"temperature": 0, "max_tokens": 8}
    hello = list(client.generate("Hello", **params))
    assert records[0]["text"] == "".join(event.text for event in hello)
    assert records[0]["prompt"] == "Hello"
    assert records[0]["finish_reason"] == hello[-1].finish_reason
    assert records[0]["usage"]["completion_tokens"] == hello[-1].usage.completion_tokens
    assert len(records[1]["logprobs"]) == records[1]["usage"]["completion_tokens"] == 3
    assert records[2]["prompt"] == [5, 6, 7] and "error" not in records[2]
    assert records[3]["error"]["code"] == "INVALID_ARGUMENT"
    assert records[3]["error"]["message"].startswith("line 5: not JSON: ")
    assert "temperature" in records[4]["error"]["message"]
    chat = client.chat([{"role": "user", "content": "Hello"}], **params)
    assert records[5]["text"] == "".join(event.text for event in chat)


def test_lines_come_from_stdin_and_go_to_stdout_and_all_well_is_0(server):
    words = ("generate", "--input", "-", "--max-tokens", "2", "--target", server.target)
    done = run(*words, input="Hello\nÜber\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(line)["prompt"] for line in done.stdout.splitlines()] == ["Hello", "Über"]
    assert "Über" in done.stdout


def test_several_replies_are_shown_one_after_the_other(server, client):
    words = ("generate", "Hello", "--n", "3", "--seed", "4", "--max-tokens", "6")
    events = list(client.generate("Hello", n=3, seed=4, max_tokens=6))
    texts = ["".join(e.text for e in events if e.index == i) for i in range(3)]
    assert len(set(texts)) > 1
    done = run(*words, "--target", server.target)
    assert done.stdout == "\n".join(f"Hello{text}\n" for text in texts)
    assert run(*words, "--echo", "--target", server.target).stdout == done.stdout
    record = json.loads(run(*words, "--output", "-", "--target", server.target).stdout)
    assert [reply["text"] for reply in record["replies"]] == texts
    assert record["text"] == texts[0]


def test_one_prompt_can_be_written_as_json_too(server):
    words = ("generate", "Hello", "--output", "-", "--max-tokens", "2", "--logprobs", "0")
    record = json.loads(run(*words, "--target", server.target).stdout)
    assert record["prompt"] == "Hello" and len(record["logprobs"]) == 2


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ((), "one of PROMPT and --input must be given"),
        (("x", "--input", "y"), "one of PROMPT and --input must be given"),
        (("x", "--concurrency", "0"), "--concurrency must be at least 1, got 0"),
        (("x", "--logit-bias", "5"), "a token's id = a number, got '5'"),
        (("x", "--target", "a", "--model", "b"), "not allowed with"),
    ],
)
def test_wrong_words_are_named_and_end_with_2(words, text):
    done = run("generate", *words)
    assert done.returncode == 2 and text in done.stderr


def test_who_stops_reading_ends_it_quietly(server):
    words = (*VIVACE, "generate", "--input", "-", "--max-tokens", "2", "--target", server.target)
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    with process:
        process.stdin.write(b"Hello\n" * 300)
        process.stdin.flush()
        assert b'"index": 0' in process.stdout.readline()
        process.stdout.close()
        process.stdin.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 141


def test_what_nobody_has_read_at_the_end_is_dropped_quietly():
    words = (*VIVACE, "config")  # says all in one piece
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(30) == 141


def test_an_interrupt_cuts_lines_off_and_writes_no_more(server, client):
    words = (*VIVACE, "generate", "--input", "-", "--ignore-eos", "--target", server.target)
    process = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        process.stdin.write(b"Hello\n" * 40)
        process.stdin.flush()
        wait_until(lambda: client.loads().num_running == 16)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert (process.stdout.read(), process.stderr.read()) == (b"", b"")
    wait_until(lambda: client.loads().num_running == 0)


def test_a_checkpoint_answers_as_a_server_does_and_leaves_nothing(server):
    words = ("generate", "Once upon", "--temperature", "0", "--max-tokens", "12")
    served = run(*words, "--target", server.target)
    here = run(*words, "--model", str(MODEL))
    assert (here.returncode, here.stderr) == (0, "")
    assert here.stdout == served.stdout
    lines = run(
        *("generate", "--input", "-", "--model", str(MODEL), "--max-tokens", "2"), input="a\nb\n"
    )
    assert [json.loads(line)["index"] for line in lines.stdout.splitlines()] == [0, 1]


def test_a_checkpoint_streams_and_an_interrupt_ends_its_engine():
    words = (*VIVACE, "generate", "Hello", "--model", str(MODEL), "--ignore-eos")
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        assert process.stdout.read(5) == b"Hello"
        assert process.stdout.read(20)  # of 2,000 tokens
        [engine] = engine_pids(process.pid)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        assert is_gone(engine, 2) and process.stderr.read() == b""


def test_a_checkpoint_that_cannot_be_served_is_one_line(tmp_path):
    done = run("generate", "x", "--model", str(tmp_path))
    assert done.returncode == 1
    assert done.stderr.startswith(f"vivace: error: model {tmp_path.name!r}: ")
    assert done.stderr.count("\n") == 1
    missing = run("generate", "x", "--model", str(tmp_path / "none"))
    assert missing.stderr == f"vivace: error: {tmp_path / 'none'} is not a folder\n"


class Shown:
    """What a program shows on a terminal, from beginning to end."""

    def __init__(self, terminal):
        self._terminal = terminal
        self._rest = ""
        self.text = ""  # all of it

    def wait(self, words):
        """Until it has shown these words, after those that were waited for before."""
        while words not in self._rest:
            more = os.read(self._terminal, 4096).decode(errors="replace")
            self._rest += more
            self.text += more
        self._rest = self._rest.split(words, 1)[1]
