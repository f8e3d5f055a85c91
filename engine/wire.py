"""Frames between the front-end and the engine process: a length, then msgpack. Never pickle.

Both sides refuse a frame over `MAX_FRAME_BYTES`: a length that large is garbage or a bug.
"""

import struct
from pathlib import Path
from typing import Any

import msgspec

from vivace.engine.config import Config
from vivace.engine.events import EngineInfo, EngineRequest, Loads, TokenEvent, TokenLogprobs

MAX_FRAME_BYTES = 64 << 20
PIECE_POSITIONS = 4096  # of a prompt's logprobs in one frame: 2 MB with all 20 best tokens
HEADER = struct.Struct("<I")


class Start(msgspec.Struct, tag=True, frozen=True):
    """To the engine, first: what to load."""

    config: Config


class Add(msgspec.Struct, tag=True, frozen=True):
    """To the engine: a request."""

    request: EngineRequest


class Abort(msgspec.Struct, tag=True, frozen=True):
    """To the engine: end a request early."""

    request_id: str


class GetLoads(msgspec.Struct, tag=True, frozen=True):
    """To the engine, which answers with `LoadsReply`."""

    number: int


class Ping(msgspec.Struct, tag=True, frozen=True):
    """To the engine, which answers with `Beat` even in the middle of a step."""


class Close(msgspec.Struct, tag=True, frozen=True):
    """To the engine: exit."""


class Loading(msgspec.Struct, tag=True, frozen=True):
    """From the engine: bytes of weights read, and in all."""

    done: int
    total: int


class Ready(msgspec.Struct, tag=True, frozen=True):
    """From the engine: it serves from now on."""

    info: EngineInfo


class Failed(msgspec.Struct, tag=True, frozen=True):
    """From the engine: it cannot load, and exits. `code` is an `EngineError`'s."""

    code: str
    message: str


class PromptLogprobs(msgspec.Struct, tag=True, frozen=True):
    """From the engine: a piece of what the request's next event has. A long prompt's whole fits no frame."""

    request_id: str
    piece: tuple[TokenLogprobs | None, ...]


class Events(msgspec.Struct, tag=True, frozen=True):
    """From the engine: all events of one step, prompt logprobs left out."""

    events: list[TokenEvent]


class Refused(msgspec.Struct, tag=True, frozen=True):
    """From the engine: a request that it did not take."""

    request_id: str
    code: str
    message: str


class LoadsReply(msgspec.Struct, tag=True, frozen=True):
    """From the engine: the answer to `GetLoads`."""

    number: int
    loads: Loads


class Beat(msgspec.Struct, tag=True, frozen=True):
    """From the engine: whether it does anything but wait, and a count that grows while that goes on."""

    is_busy: bool
    progress: int


ToEngine = Start | Add | Abort | GetLoads | Ping | Close
FromEngine = Loading | Ready | Failed | PromptLogprobs | Events | Refused | LoadsReply | Beat


def _encode_other(value: Any) -> str:
    if isinstance(value, Path):
        return str(value)
    raise TypeError(f"{type(value).__name__} does not go over the wire")


def _decode_other(wanted: type, value: Any) -> Any:
    if wanted is Path:
        return Path(value)
    raise TypeError(f"{wanted.__name__} does not come over the wire")


_encoder = msgspec.msgpack.Encoder(enc_hook=_encode_other)
_to_engine = msgspec.msgpack.Decoder(ToEngine, dec_hook=_decode_other)
_from_engine = msgspec.msgpack.Decoder(FromEngine, dec_hook=_decode_other)


def encode(frame: ToEngine | FromEngine) -> bytes:
    """A frame with its length. Raises ValueError if it is too large to send."""
    body = _encoder.encode(frame)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"{type(frame).__name__} of {len(body)} bytes, at most {MAX_FRAME_BYTES}")
    return HEADER.pack(len(body)) + body


def body_bytes(header: bytes) -> int:
    """The length that a header announces. Raises ValueError if it is too large."""
    (length,) = HEADER.unpack(header)
    if length > MAX_FRAME_BYTES:
        raise ValueError(f"frame of {length} bytes, at most {MAX_FRAME_BYTES}")
    return int(length)


def decode_to_engine(body: bytes) -> ToEngine:
    """Raises msgspec.MsgspecError for anything but a frame to the engine."""
    frame: ToEngine = _to_engine.decode(body)
    return frame


def decode_from_engine(body: bytes) -> FromEngine:
    """Raises msgspec.MsgspecError for anything but a frame from the engine."""
    frame: FromEngine = _from_engine.decode(body)
    return frame
