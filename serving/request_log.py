"""One JSON line on stderr for each request that ends. Never its text."""

import json
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field, fields
from typing import TextIO

from vivace.engine.completion import TextEvent


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
    """Writes entries."""

    def __init__(self, out: TextIO | None = None) -> None:
        self._out = out or sys.stderr

    def write(self, entry: LogEntry) -> None:
        """One line."""
        say(entry.line(), self._out)


def say(text: str, out: TextIO) -> None:
    """Write to a log. Whoever reads it may have gone: no request shall end for that."""
    with suppress(OSError, ValueError):  # a broken pipe, a full disk; a file that is closed
        print(text, file=out, flush=True)
