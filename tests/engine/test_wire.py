"""Frames keep what they carry, and what is no frame is refused."""

from dataclasses import fields
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vivace.engine import wire
from vivace.engine.config import (
    CacheConfig,
    Config,
    CpuConfig,
    KvDType,
    SchedulerConfig,
    WeightsConfig,
)
from vivace.engine.events import (
    EngineInfo,
    EngineRequest,
    FinishReason,
    Loads,
    Pooling,
    Sampling,
    TokenEvent,
    TokenLogprobs,
    Usage,
)
from vivace.engine.models.quantize import Quantize
from vivace.kernels.backend import Backend

COUNT = st.integers(0, 2**63 - 1)
TOKEN = st.integers(0, 2**31 - 1)
LOGPROB = st.floats(max_value=0, allow_nan=False)  # minus infinity included
SECONDS = st.floats(0, 1e9)
TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=20)

LOADS = st.builds(Loads, COUNT, COUNT, expert_loads=st.tuples(st.tuples(COUNT, COUNT)))
LOGPROBS = st.builds(
    TokenLogprobs,
    TOKEN,
    LOGPROB,
    COUNT,
    st.lists(st.tuples(TOKEN, LOGPROB), max_size=3).map(tuple),
)
SAMPLING = st.builds(
    Sampling,
    temperature=st.floats(0, 2),
    top_k=COUNT,
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**64 - 1),
    max_tokens=COUNT,
    min_tokens=COUNT,
    stop_token_ids=st.lists(TOKEN, max_size=3).map(tuple),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs_start=COUNT,
)
REQUEST = st.builds(
    EngineRequest,
    TEXT,
    st.lists(TOKEN, max_size=5).map(tuple),
    SAMPLING,
    deadline=st.none() | SECONDS,
    salt=st.binary(max_size=8),
    priority=st.integers(-5, 5),
    pooling=st.none() | st.sampled_from(Pooling),
)
USAGE = st.builds(Usage, COUNT, COUNT, COUNT, SECONDS, SECONDS, SECONDS, COUNT)
EVENT = st.builds(
    TokenEvent,
    TEXT,
    st.lists(TOKEN, max_size=3).map(tuple),
    st.lists(LOGPROBS, max_size=3).map(tuple),
    st.lists(st.none() | LOGPROBS, max_size=3).map(tuple),
    finish=st.none() | st.sampled_from(FinishReason),
    stop_token_id=st.none() | TOKEN,
    usage=st.none() | USAGE,
    embedding=st.none() | st.lists(st.floats(width=32, allow_nan=False), max_size=5).map(tuple),
)
CONFIG = st.builds(
    Config,
    model=TEXT.map(lambda name: Path("models") / name.replace("\0", "")),
    backend=st.sampled_from(Backend),
    device=TEXT,
    max_context_tokens=st.none() | COUNT,
    scheduler=st.builds(
        SchedulerConfig,
        max_step_tokens=st.integers(64, 4096),
        max_running=st.integers(1, 64),
        max_waiting=st.integers(1, 100),
    ),
    cache=st.builds(
        CacheConfig,
        dtype=st.sampled_from(KvDType),
        block_tokens=st.integers(1, 64),
        memory_bytes=st.none() | st.integers(1, 2**62),
        prefix_sharing=st.booleans(),
        verify_hits=st.booleans(),
    ),
    cpu=st.builds(
        CpuConfig, threads=st.none() | st.integers(1, 256), isa=st.none() | st.just("avx2")
    ),
    weights=st.builds(
        WeightsConfig,
        quantize=st.sampled_from(Quantize),
        group=st.sampled_from((32, 64, 128)),
        cache_dir=st.none() | st.just(Path("a b")),
    ),
)
INFO = st.builds(
    EngineInfo,
    **dict.fromkeys((field.name for field in fields(EngineInfo)), COUNT)
    | dict.fromkeys(("architecture", "dtype", "weights", "backend", "kv_dtype"), TEXT)
    | {"eos_token_ids": st.lists(TOKEN, max_size=3).map(tuple), "load_s": SECONDS}
    | {"isa": st.none() | TEXT},
)
PIECE = st.lists(st.none() | LOGPROBS, max_size=3).map(tuple)
TO_ENGINE = {
    wire.Start: st.builds(wire.Start, CONFIG),
    wire.Add: st.builds(wire.Add, REQUEST),
    wire.Abort: st.builds(wire.Abort, TEXT),
    wire.GetLoads: st.builds(wire.GetLoads, COUNT),
    wire.Ping: st.just(wire.Ping()),
    wire.Close: st.just(wire.Close()),
}
FROM_ENGINE = {
    wire.Loading: st.builds(wire.Loading, COUNT, COUNT),
    wire.Ready: st.builds(wire.Ready, INFO),
    wire.Failed: st.builds(wire.Failed, TEXT, TEXT),
    wire.PromptLogprobs: st.builds(wire.PromptLogprobs, TEXT, PIECE),
    wire.Events: st.builds(wire.Events, st.lists(EVENT, max_size=3)),
    wire.Refused: st.builds(wire.Refused, TEXT, TEXT, TEXT),
    wire.LoadsReply: st.builds(wire.LoadsReply, COUNT, LOADS),
    wire.Beat: st.builds(wire.Beat, st.booleans(), COUNT),
}


@pytest.mark.parametrize("kind", wire.ToEngine.__args__)
@settings(max_examples=30)
@given(data=st.data())
def test_every_frame_to_the_engine_arrives_as_it_left(kind, data):
    frame = data.draw(TO_ENGINE[kind])
    sent = wire.encode(frame)
    header, body = sent[: wire.HEADER.size], sent[wire.HEADER.size :]
    assert wire.body_bytes(header) == len(body)
    assert wire.decode_to_engine(body) == frame


@pytest.mark.parametrize("kind", wire.FromEngine.__args__)
@settings(max_examples=30)
@given(data=st.data())
def test_every_frame_from_the_engine_arrives_as_it_left(kind, data):
    frame = data.draw(FROM_ENGINE[kind])
    sent = wire.encode(frame)
    header, body = sent[: wire.HEADER.size], sent[wire.HEADER.size :]
    assert wire.body_bytes(header) == len(body)
    assert wire.decode_from_engine(body) == frame


def test_a_frame_that_is_too_large_is_neither_sent_nor_read(monkeypatch):
    size = len(wire.encode(wire.Abort("a" * 100))) - wire.HEADER.size
    monkeypatch.setattr(wire, "MAX_FRAME_BYTES", size)
    wire.encode(wire.Abort("a" * 100))
    assert wire.body_bytes(wire.HEADER.pack(size)) == size
    with pytest.raises(ValueError, match=f"Abort of {size + 1} bytes, at most {size}"):
        wire.encode(wire.Abort("a" * 101))
    with pytest.raises(ValueError, match=f"frame of {size + 1} bytes, at most {size}"):
        wire.body_bytes(wire.HEADER.pack(size + 1))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1garbage",
        msgspec.msgpack.encode({"type": "Unknown"}),
        msgspec.msgpack.encode({"type": "Abort", "request_id": 3}),
        msgspec.msgpack.encode({"type": "Abort"}),
        msgspec.msgpack.encode({"type": "Beat", "is_busy": True, "progress": 0}),  # not to it
        msgspec.msgpack.encode({"type": "Close"})[:-1],
    ],
)
def test_what_is_not_a_frame_to_the_engine_is_refused(body):
    with pytest.raises(msgspec.MsgspecError):
        wire.decode_to_engine(body)


def test_a_frame_to_the_engine_is_refused_by_the_front_end():
    with pytest.raises(msgspec.MsgspecError):
        wire.decode_from_engine(wire.encode(wire.Abort("a"))[wire.HEADER.size :])


def test_a_piece_of_prompt_logprobs_fits_a_frame_at_its_largest():
    most = TokenLogprobs(2**31, -1.5, 2**31, ((2**31, -1.5),) * 20)
    piece = wire.PromptLogprobs("i" * 1000, (most,) * wire.PIECE_POSITIONS)
    assert len(wire.encode(piece)) < wire.MAX_FRAME_BYTES / 10
