"""Text from tokens: no character is split, no stop string is missed, every request ends once."""

import asyncio
import random

import pytest
import tokenizers
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tiny_models import make_tokenizer
from vivace.engine.completion import Completion, Detokenizer, stream
from vivace.engine.events import EngineRequest, FinishReason, Sampling, TokenEvent, Usage
from vivace.engine.sampling import TextRules
from vivace.engine.tokenizer import Tokenizer

SCRIPTS = {
    "English": "I'd like a refund, please - it's the 3rd time!",
    "Hindi": "कृपया मेरा ऑर्डर रद्द करें, क्षमा कीजिए",
    "Arabic": "أين طلبي؟ لم يصل بعدُ.",
    "Thai": "สินค้าที่ได้รับชำรุด ขอคืนเงินได้ไหม",
    "Chinese": "请问退款什么时候到账？谢谢！",
    "Korean": "환불은 언제 되나요?",
    "Russian": "Когда придёт мой заказ?",
    "emoji": "ok 👍🏽 👩‍👩‍👧‍👦 🇮🇳 ✨ done",
}
USAGE = Usage(3, 0, 99, 0.0, 0.1, 0.2, 0)
GREEDY = Sampling(0.0, 0, 1.0, 0.0, 0, 50, 0, (), None, None)


@pytest.fixture(scope="module")
def byte_tokenizer(tmp_path_factory):
    """One token a byte: every character beyond ASCII is split as badly as can be."""
    directory = tmp_path_factory.mktemp("bytes")
    make_tokenizer(directory)
    return Tokenizer.load(directory)


def push_all(completion, ids, *, finish=FinishReason.LENGTH, stop_token_id=None, group=1):
    """Events of `group` tokens; stops as a caller does, but for the engine's own end after a match."""
    events = []
    for i in range(0, len(ids), group):
        is_last = i + group >= len(ids)
        event = TokenEvent(
            "r",
            tuple(ids[i : i + group]),
            finish=finish if is_last else None,
            stop_token_id=stop_token_id if is_last else None,
            usage=USAGE if is_last else None,
        )
        events.append(completion.push(event))
        if events[-1].finish is not None:
            break
        if completion.matched is not None:
            ended = TokenEvent("r", finish=FinishReason.ABORT, usage=USAGE)
            events.append(completion.push(ended))
            break
    return events


def text_of(events):
    return "".join(event.text for event in events)


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_character_is_split(byte_tokenizer, script):
    detokenizer = Detokenizer(byte_tokenizer, skip_special_tokens=True)
    pieces = [detokenizer.push(i) for i in byte_tokenizer.encode(SCRIPTS[script])]
    assert "".join(pieces) + detokenizer.finish() == SCRIPTS[script]
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, 259), max_size=60))
def test_any_bytes_come_out_as_the_whole_would(byte_tokenizer, ids):
    detokenizer = Detokenizer(byte_tokenizer, skip_special_tokens=True)
    pieces = [detokenizer.push(i) for i in ids]
    assert "".join(pieces) + detokenizer.finish() == byte_tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["gpt2", "qwen2", "llama3.2", "minimind"])
def test_real_vocabularies_come_out_as_the_whole_would(shared_data, name):
    packed = (shared_data / "tokenizers" / name / "tokenizer.json.zst").read_bytes()
    text = zstandard.ZstdDecompressor().stream_reader(packed).read().decode()
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(text), None)
    rng = random.Random(0)
    size = tokenizers.Tokenizer.from_str(text).get_vocab_size()
    texts = list(SCRIPTS.values())
    for ids in [tokenizer.encode(one) for one in texts] + [
        [rng.randrange(size) for _ in range(40)] for _ in range(20)
    ]:
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=True)
        pieces = [detokenizer.push(i) for i in ids]
        assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["stories260K", "northstar-dense"])
def test_the_checkpoints_vocabularies_come_out_as_the_whole_would(shared_data, name):
    tokenizer = Tokenizer.load(shared_data / "models" / name)
    for text in SCRIPTS.values():
        ids = tokenizer.encode("Once " + text, add_special_tokens=False)
        detokenizer = Detokenizer(tokenizer, skip_special_tokens=True)
        pieces = [detokenizer.push(i) for i in ids]
        assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("include", [False, True])
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_stop_string_is_found_across_tokens_in_every_script(byte_tokenizer, script, include):
    text = SCRIPTS[script]
    for start in range(1, len(text) - 3, 2):
        stop = text[start : start + 3]
        rules = TextRules(stop=("never there", stop), include_stop=include)
        completion = Completion(byte_tokenizer, rules)
        events = push_all(completion, byte_tokenizer.encode(text))
        end = text.index(stop) + (len(stop) if include else 0)
        assert text_of(events) == text[:end]
        assert (events[-1].finish, events[-1].stop) == (FinishReason.STOP, stop)
        ids = [token for event in events for token in event.token_ids]
        done = len(text[: text.index(stop) + len(stop)].encode())
        assert ids == byte_tokenizer.encode(text)[:done]
        assert events[-1].usage.completion_tokens == done


@settings(max_examples=300)
@given(
    text=st.text("abé", max_size=30),
    stops=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
    group=st.integers(1, 5),
)
def test_the_text_ends_where_a_plain_search_says(byte_tokenizer, text, stops, group):
    """However the tokens are grouped into events: the same as token by token, the first to be complete wins."""
    rules = TextRules(stop=tuple(stops))
    ids = byte_tokenizer.encode(text) or [97]
    whole = byte_tokenizer.decode(ids)
    want, reason = whole, FinishReason.LENGTH
    for end in range(len(whole) + 1):
        found = [s for s in stops if whole[:end].endswith(s)]
        if found:
            want, reason = whole[: end - max(map(len, found))], FinishReason.STOP
            break
    events = push_all(Completion(byte_tokenizer, rules), ids, group=group)
    assert (text_of(events), events[-1].finish) == (want, reason)
    assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)


def test_text_that_may_begin_a_stop_string_is_held_back_and_then_shown(byte_tokenizer):
    completion = Completion(byte_tokenizer, TextRules(stop=("abcd",)))
    events = push_all(completion, byte_tokenizer.encode("xabcabc!"))
    assert [event.text for event in events] == ["x", "", "", "", "abc", "", "", "abc!"]


def test_what_is_held_back_at_the_end_is_shown(byte_tokenizer):
    events = push_all(
        Completion(byte_tokenizer, TextRules(stop=("END",))), byte_tokenizer.encode("the EN")
    )
    assert text_of(events) == "the EN" and events[-1].finish is FinishReason.LENGTH


def test_half_a_character_at_the_end_is_shown_as_what_it_is(byte_tokenizer):
    events = push_all(Completion(byte_tokenizer, TextRules()), list("a退".encode())[:-1])
    assert text_of(events) == "a\ufffd"


def test_min_tokens_holds_back_stop_strings(byte_tokenizer):
    rules = TextRules(stop=("ab",), min_tokens=4)
    events = push_all(Completion(byte_tokenizer, rules), byte_tokenizer.encode("abxxxxab!"))
    assert text_of(events) == "abxxxx" and events[-1].finish is FinishReason.STOP
    rules = TextRules(
        stop=("ab",), min_tokens=3
    )  # completed by the fourth token, begun by the third
    events = push_all(Completion(byte_tokenizer, rules), byte_tokenizer.encode("xxab!"))
    assert text_of(events) == "xx"


def test_the_stop_token_is_counted_and_not_shown(byte_tokenizer):
    events = push_all(
        Completion(byte_tokenizer, TextRules()),
        byte_tokenizer.encode("hi!"),
        finish=FinishReason.STOP,
        stop_token_id=ord("!"),
    )
    assert text_of(events) == "hi" and events[-1].token_ids == (ord("!"),)
    assert events[-1].stop == ord("!")


class FakeEngine:
    """Says a text byte by byte until aborted."""

    def __init__(self, text):
        self.ids = list(text.encode())
        self.aborted = []
        self.closed = False

    async def generate(self, request):
        try:
            for i, token in enumerate(self.ids):
                if self.aborted:
                    yield TokenEvent(request.request_id, finish=FinishReason.ABORT, usage=USAGE)
                    return
                is_last = i == len(self.ids) - 1
                yield TokenEvent(
                    request.request_id,
                    (token,),
                    finish=FinishReason.LENGTH if is_last else None,
                    usage=USAGE if is_last else None,
                )
        finally:
            self.closed = True

    async def abort(self, request_id):
        self.aborted.append(request_id)
        return True


def collect(engine, tokenizer, rules, *, most=1000):
    async def run():
        events = []
        request = EngineRequest("r", (1,), GREEDY)
        streamed = stream(engine, tokenizer, request, rules)
        async for event in streamed:
            events.append(event)
            if len(events) == most:
                break
        await streamed.aclose()
        return events

    return asyncio.run(run())


def test_a_stop_string_aborts_the_engine_and_its_end_becomes_a_stop(byte_tokenizer):
    engine = FakeEngine("one two three four")
    events = collect(engine, byte_tokenizer, TextRules(stop=("three",)))
    assert text_of(events) == "one two "
    assert engine.aborted == ["r"]
    assert [event.finish for event in events if event.finish] == [FinishReason.STOP]
    assert events[-1].usage.completion_tokens == len("one two three")


def test_a_stop_string_in_the_very_last_token_needs_no_abort(byte_tokenizer):
    engine = FakeEngine("one two")
    events = collect(engine, byte_tokenizer, TextRules(stop=("two",)))
    assert (text_of(events), engine.aborted, events[-1].finish) == ("one ", [], FinishReason.STOP)


def test_closing_early_closes_the_engines_stream(byte_tokenizer):
    engine = FakeEngine("a long story")
    collect(engine, byte_tokenizer, TextRules(), most=3)
    assert engine.closed


@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.DEADLINE])
def test_an_early_end_is_passed_on(byte_tokenizer, reason):
    events = push_all(
        Completion(byte_tokenizer, TextRules(stop=("zz",))), list(b"az"), finish=reason
    )
    assert (events[-1].finish, text_of(events)) == (reason, "az")
