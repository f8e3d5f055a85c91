"""Text from tokens: no character is split, no stop string is missed, every request ends once."""

import asyncio
import random

import pytest
import tokenizers
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers

from tests.tiny_models import make_tokenizer
from vivace.engine.completion import Completion, Detokenizer, TextEvent, stream
from vivace.engine.events import (
    EngineRequest,
    FinishReason,
    Sampling,
    TokenEvent,
    TokenLogprobs,
    Usage,
)
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


@pytest.fixture(scope="module")
def fallback_tokenizer():
    """Llama's kind: `▁` is a space, the first space is dropped, what has no token is written byte by byte."""
    texts = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ा"]
    made = tokenizers.Tokenizer(
        models.BPE({text: i for i, text in enumerate(texts)}, [("▁", "a")], byte_fallback=True)
    )
    made.add_special_tokens(["<s>", "</s>"])
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return Tokenizer(made, None)


def pieces_of(tokenizer, ids, *, skip=True):
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip)
    return [*(detokenizer.push(i) for i in ids), detokenizer.finish()]


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


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_character_is_split_into_byte_tokens(fallback_tokenizer, script):
    text = SCRIPTS[script]
    ids = fallback_tokenizer.encode(text)
    pieces = pieces_of(fallback_tokenizer, ids)
    assert "".join(pieces) == text == fallback_tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)
    done = [fallback_tokenizer.decode(ids[: i + 1]) for i in range(len(ids))]
    for i, whole in enumerate(done):  # nothing is kept that could be shown
        if "\ufffd" not in whole:
            assert "".join(pieces[: i + 1]) == whole


@settings(max_examples=300)
@given(
    parts=st.lists(st.text("a b\n1é退👍ा", max_size=4) | st.sampled_from([0, 1]), max_size=20),
    starts_bare=st.booleans(),
    skip=st.booleans(),
)
def test_byte_tokens_come_out_as_the_whole_would(fallback_tokenizer, parts, starts_bare, skip):
    """`starts_bare`: the text begins with a raw space byte, which decoding drops as it drops any first space."""
    ids = [2 + ord(" ")] if starts_bare else []
    for part in parts:
        ids += [part] if isinstance(part, int) else fallback_tokenizer.encode(part)
    whole = fallback_tokenizer.decode(ids, skip_special_tokens=skip)
    assert "".join(pieces_of(fallback_tokenizer, ids, skip=skip)) == whole


@settings(max_examples=300)
@given(runs=st.lists(st.binary(max_size=8), max_size=8))
def test_bytes_that_are_no_text_spoil_nothing_beside_them(fallback_tokenizer, runs):
    a = len(fallback_tokenizer.byte_tokens) + 3  # the letter
    ids = [a]
    for run in runs:
        ids += [*(2 + byte for byte in run), a]
    want = "a" + "".join(run.decode(errors="replace") + "a" for run in runs)
    assert "".join(pieces_of(fallback_tokenizer, ids)) == want


def test_names_of_bytes_that_are_plain_text_stay_text():
    made = tokenizers.Tokenizer(models.BPE({"<0x41>": 0, "<0xE9>": 1}, []))
    made.decoder = decoders.Fuse()
    tokenizer = Tokenizer(made, None)
    assert pieces_of(tokenizer, [0, 1]) == ["<0x41>", "<0xE9>", ""]


def test_special_tokens_between_the_bytes_of_a_character_are_left_out(byte_tokenizer):
    first, *rest = "退".encode()
    for num_between in (1, 40):
        assert "".join(pieces_of(byte_tokenizer, [first, *[257] * num_between, *rest])) == "退"
    ids = [*b"a", 257, *b"b"]
    assert "".join(pieces_of(byte_tokenizer, ids, skip=False)) == "a<|end|>b"


@pytest.mark.parametrize(
    ("kind", "text", "most"),
    [
        ("byte_tokenizer", SCRIPTS["English"] * 50, 4),
        ("byte_tokenizer", SCRIPTS["Hindi"] * 50, 8),
        ("fallback_tokenizer", SCRIPTS["Hindi"] * 50, 8),
        ("byte_tokenizer", None, 16),  # no characters at all
    ],
)
def test_a_long_text_costs_no_more_per_token_than_a_short_one(
    request, kind, text, most, monkeypatch
):
    tokenizer = request.getfixturevalue(kind)
    ids = [0x80] * 200 if text is None else tokenizer.encode(text)
    lengths = []
    plain = Tokenizer.decode

    def decode(self, ids, *, skip_special_tokens=True):
        lengths.append(len(ids))
        return plain(self, ids, skip_special_tokens=skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", decode)
    pieces_of(tokenizer, ids)
    assert max(lengths) <= most


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


@pytest.mark.parametrize("kind", ["byte_tokenizer", "fallback_tokenizer"])
def test_half_a_character_at_the_end_is_shown_as_what_it_is(request, kind):
    tokenizer = request.getfixturevalue(kind)
    events = push_all(Completion(tokenizer, TextRules()), tokenizer.encode("a退")[:-1])
    assert text_of(events) == "a\ufffd"


def test_of_two_stop_strings_in_one_token_the_first_to_be_complete_wins(fallback_tokenizer):
    """As it would be had the token been several."""
    ids = [*fallback_tokenizer.encode("b"), fallback_tokenizer.encode("xx a")[-1]]  # "b", " a"
    assert [fallback_tokenizer.token_text(i) for i in ids[-2:]] == ["b", "a"]
    for stop in (("b a", " "), (" ", "b a")):
        events = push_all(Completion(fallback_tokenizer, TextRules(stop=stop)), ids)
        assert (text_of(events), events[-1].stop) == ("b", " ")


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


def test_the_engine_is_aborted_before_the_reader_takes_the_last_piece(byte_tokenizer):
    engine = FakeEngine("one two three")

    async def run():
        request = EngineRequest("r", (1,), GREEDY)
        streamed = stream(engine, byte_tokenizer, request, TextRules(stop=("two",)))
        async for event in streamed:
            if event.token_ids == (ord("o"),) and engine.aborted:
                break  # the piece that completed the stop string, with the abort already asked for
        else:
            raise AssertionError("the engine ran on while the reader held the piece")
        await streamed.aclose()

    asyncio.run(run())
    assert engine.closed


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


def test_a_request_that_draws_nothing_shows_its_prompts_logprobs_and_ends(byte_tokenizer):
    places = (None, TokenLogprobs(97, -0.5, 1, ()))
    ends = {"prompt_logprobs": places, "finish": FinishReason.LENGTH, "usage": USAGE}
    completion = Completion(byte_tokenizer, TextRules(stop=("zz",), min_tokens=3))
    assert completion.push(TokenEvent("r", **ends)) == TextEvent("r", **ends)
