"""Calls that are tried again: refused for now, or cut off before the first message. The rules are those of gRPC's own
retries (gRFC A6). Theirs are off: in gRPC 1.85 a stream whose last try finds nobody listening may never end.

A try that ended RESOURCE_EXHAUSTED or UNAVAILABLE is repeated after the time that the server's pushback names (negative:
not at all), else with exponential backoff and jitter. A wait that would pass the deadline is not begun, nor is a message sent
again that gRPC itself found too large. A stream's next try is made while somebody waits for its messages.
"""

import asyncio
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import grpc

from vivace.serving.client.errors import VivaceError, closed, error_of, pushback_ms

MAX_RETRIES = 4
CODES = (grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE)
FIRST_WAIT_S = 0.2
MAX_WAIT_S = 5.0
JITTER = 0.2
MAX_PUSHBACK_MS = 86_400_000  # a day: who asks for more asks for none
TOO_LARGE = (
    "message larger than max"  # in gRPC's own refusals, of either side, which carry no pushback
)

Begin = Callable[[float], Any]  # one try, in so many seconds (`math.inf`: no end to it)


class Timer:
    """What is left of a time that all tries share, or all calls."""

    def __init__(self, timeout: float) -> None:
        self._end = time.monotonic() + timeout

    def left(self) -> float:
        """Seconds, for the next of them; `math.inf`: no end to it."""
        return max(0.0, self._end - time.monotonic())

    def allows(self, wait_s: float) -> bool:
        """Whether there is time left after a wait."""
        return time.monotonic() + wait_s < self._end


class Retries:
    """How often one call is tried again, and when."""

    def __init__(self, timeout: float, max_retries: int) -> None:
        self.timer = Timer(timeout)
        self._left = max_retries
        self._wait_s = FIRST_WAIT_S

    def wait_after(self, error: Any) -> float:
        """Seconds until the next try. Raises `error` as a VivaceError if there is to be none."""
        wait_s = self._wait(error)
        if wait_s is None or not self.timer.allows(wait_s):
            raise error_of(error) from error
        self._left -= 1
        return wait_s

    def stop(self) -> None:
        """No more tries: a message has come."""
        self._left = 0

    def _wait(self, error: Any) -> float | None:
        if not self._left or error.code() not in CODES:
            return None
        asked_ms = pushback_ms(error)
        if asked_ms is not None:
            self._wait_s = FIRST_WAIT_S
            return asked_ms / 1e3 if 0 <= asked_ms <= MAX_PUSHBACK_MS else None
        if TOO_LARGE in (error.details() or ""):
            return None
        wait_s = self._wait_s * random.uniform(1 - JITTER, 1 + JITTER)
        self._wait_s = min(self._wait_s * 2, MAX_WAIT_S)
        return wait_s


def check_retries(max_retries: int) -> int:
    """`max_retries`. Raises ValueError if it is not in 0..4."""
    if not 0 <= max_retries <= MAX_RETRIES:
        raise ValueError(f"max_retries must be in 0..{MAX_RETRIES}, got {max_retries}")
    return max_retries


class Waits:
    """The waits between tries of one client's calls. Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._is_closed = False

    def after(
        self, error: Any, retries: Retries, is_cancelled: Callable[[], bool] = lambda: False
    ) -> None:
        """Wait until the next try. Raises what ends the call: `error`, or Cancelled as soon as the client is closed or the
        call cancelled."""
        if self._is_closed and error.code() is grpc.StatusCode.CANCELLED:
            raise closed() from error
        seconds = retries.wait_after(error)
        error.__traceback__ = None  # it is the old call, and its frames hold the new one, which would run on when forgotten
        with self._changed:
            if self._changed.wait_for(lambda: self._is_closed or is_cancelled(), seconds):
                raise closed()

    def wake(self) -> None:
        """Some call was cancelled."""
        with self._changed:
            self._changed.notify_all()

    def close(self) -> None:
        """End all waits, and those to come."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()


async def _wait_async(seconds: float, *ends: asyncio.Event) -> None:
    """Raises CancelledError, as gRPC's own calls do, as soon as one of the events is there."""
    tasks = [asyncio.create_task(end.wait()) for end in ends]
    try:
        await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    if any(end.is_set() for end in ends):
        raise asyncio.CancelledError


def unary(begin: Begin, retries: Retries, waits: Waits) -> Any:
    """The reply of a call that does not stream. Raises VivaceError."""
    while True:
        try:
            return begin(retries.timer.left())
        except VivaceError:
            raise  # the client was closed before
        except grpc.RpcError as error:
            waits.after(error, retries)


async def unary_async(begin: Begin, retries: Retries, is_closed: asyncio.Event) -> Any:
    """See `unary`. CancelledError if the client is closed meanwhile."""
    while True:
        try:
            return await begin(retries.timer.left())
        except VivaceError:
            raise  # the client was closed before
        except grpc.RpcError as error:
            await _wait_async(retries.wait_after(error), is_closed)


class Messages:
    """Messages of a call that streams. Raises VivaceError. Forgetting it cancels the call."""

    def __init__(self, begin: Begin, retries: Retries, waits: Waits) -> None:
        self._begin = begin
        self._retries = retries
        self._waits = waits
        self._lock = (
            threading.RLock()
        )  # the collector may call `cancel` in a thread that begins a try
        self._is_cancelled = threading.Event()
        self._call = begin(retries.timer.left())

    def __iter__(self) -> "Messages":
        return self

    def __next__(self) -> Any:
        while True:
            try:
                message = next(self._call)
            except grpc.RpcError as error:
                self._waits.after(error, self._retries, self._is_cancelled.is_set)
                self._again()
            else:
                self._retries.stop()
                return message

    def cancel(self) -> None:
        """End it, from any thread."""
        with self._lock:
            self._is_cancelled.set()
            self._call.cancel()
        self._waits.wake()

    def _again(self) -> None:
        with self._lock:
            if self._is_cancelled.is_set():
                raise closed()
            self._call = self._begin(self._retries.timer.left())
            if self._is_cancelled.is_set():  # meanwhile, by the collector
                self._call.cancel()


class AsyncMessages:
    """See `Messages`; as gRPC's own calls it keeps running when forgotten, and ends with CancelledError when cancelled."""

    def __init__(self, begin: Begin, retries: Retries, is_closed: asyncio.Event) -> None:
        self._begin = begin
        self._retries = retries
        self._is_closed = is_closed
        self._is_cancelled = asyncio.Event()
        self._call = begin(retries.timer.left())

    def __aiter__(self) -> "AsyncMessages":
        return self

    async def __anext__(self) -> Any:
        while True:
            try:
                message = await self._call.read()
            except grpc.RpcError as error:
                wait_s = self._retries.wait_after(error)
                await _wait_async(wait_s, self._is_closed, self._is_cancelled)
                self._call = self._begin(self._retries.timer.left())
            else:
                self._retries.stop()
                if message is grpc.aio.EOF:
                    raise StopAsyncIteration
                return message

    def done(self) -> bool:
        """Whether nothing runs now."""
        return bool(self._call.done())

    def cancel(self) -> None:
        """End it."""
        self._is_cancelled.set()
        self._call.cancel()
