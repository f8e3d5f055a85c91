"""One JSON line on stderr for each request that ends. Never its text."""

import json
import select
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, fields
from io import UnsupportedOperation
from typing import TextIO

from vivace.engine.completion import TextEvent

PIECE_CHARS = select.PIPE_BUF // 4  # of at most 4 bytes: what a pipe that has room takes whole


@dataclass(slots=True)
class LogEntry:
    """What is known of a request so far; the servicer fills it in as it goes."""

    id: str
    rpc: str
    code: str = "INTERNAL"  # what it was if nobody says otherwise: a bug
    reason: str | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    queue_ms: float = 0.0
    first_token_ms: float = 0.0
    total_ms: float = 0.0
    started: float = field(default_factory=time.monotonic)

    def note(self, event: TextEvent) -> None:
        """Count an event. The first token's time is the front-end's until the engine's is known; of several replies, the
        first one's end tells the rest."""
        if event.token_ids and self.completion_tokens == 0:
            self.first_token_ms = self._elapsed_ms()
        self.completion_tokens += len(event.token_ids)
        if event.usage is not None and event.finish is not None and event.index == 0:
            self.reason = event.finish.value
            self.cached_tokens = event.usage.cached_tokens
            self.queue_ms = round(event.usage.queue_s * 1e3, 3)
            self.first_token_ms = round(event.usage.first_token_s * 1e3, 3)

    def line(self) -> str:
        """The record, now that the request has ended."""
        self.total_ms = self._elapsed_ms()
        known = {name: getattr(self, name) for name in SHOWN}
        return json.dumps({"time": round(time.time(), 3), "event": "request", **known})

    def _elapsed_ms(self) -> float:
        return round((time.monotonic() - self.started) * 1e3, 3)


SHOWN = tuple(one.name for one in fields(LogEntry) if one.name != "started")


class RequestLog:
    """Writes entries. Lines that are lost are counted, and told of once somebody reads again."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr
        self._num_lost = 0

    def write(self, entry: LogEntry) -> None:
        """One line."""
        if self._num_lost:
            lost = {"time": round(time.time(), 3), "event": "lost", "lines": self._num_lost}
            if say(json.dumps(lost), self._out):
                self._num_lost = 0
        self._num_lost += not say(entry.line(), self._out)


def say(text: str, out: TextIO) -> bool:
    """Write to a log; whether it took all. Whoever reads it may have gone or stopped: no request shall end or wait for that."""
    data = f"{text}\n"
    with suppress(OSError, ValueError):  # a broken pipe, a full disk; a file that is closed
        for start in range(0, len(data), PIECE_CHARS):
            if not _has_room(out):
                return False
            out.write(data[start : start + PIECE_CHARS])
            out.flush()
        return True
    return False


def _has_room(out: TextIO) -> bool:
    """Whether a piece can be written without waiting for somebody to read; of what is no file of the system's, always.

    Of a pipe that nobody reads any more, never: what Python keeps of a failed write would fail again when the process ends.
    """
    try:
        number = out.fileno()
    except UnsupportedOperation:
        return True
    looked = select.poll()  # unlike `select.select`, of files with any number
    looked.register(number, select.POLLOUT)
    return any(events == select.POLLOUT for _, events in looked.poll(0))
