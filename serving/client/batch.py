"""Many requests over few calls: how they are split, and how the answers of several calls at once become one iterator.

An item that fails, alone or with its call, fails as a value in its own place; nothing that was answered is lost.
"""

import asyncio
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import grpc

from vivace.serving.client import results
from vivace.serving.client.errors import (
    VivaceError,
    closed,
    error_of_item,
    is_task_cancelled,
)
from vivace.serving.client.results import Completion
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb

Outcome = Completion | VivaceError
Answer = tuple[int, Outcome]  # which of the requests, and what became of it
Start = Callable[[pb.BatchRequest], Any]  # begins a call
Progress = Callable[[int, int], None]  # requests that have ended, all requests
MAX_ITEMS = 1024  # of one call: the server takes no more
MAX_BYTES = 3 << 20  # of one call: the server takes 4 MiB
ITEM_BYTES = 8  # at most, around each item
NO_ANSWER = (grpc.StatusCode.INTERNAL.value[0], "the call ended without an answer to this item")


@dataclass(frozen=True, slots=True)
class Call:
    """Some requests that stand side by side."""

    first: int  # which of all requests its first item is
    request: pb.BatchRequest


def split(items: Sequence[pb.BatchItem]) -> list[Call]:
    """As few calls as the limits allow. An item over the limit goes alone: the server refuses it, and no other."""
    calls: list[Call] = []
    num_bytes = 0
    for i, item in enumerate(items):
        size = item.ByteSize() + ITEM_BYTES
        is_full = bool(calls) and (
            len(calls[-1].request.items) >= MAX_ITEMS or num_bytes + size > MAX_BYTES
        )
        if not calls or is_full:
            calls.append(Call(i, pb.BatchRequest()))
            num_bytes = 0
        calls[-1].request.items.append(item)
        num_bytes += size
    return calls


class _Answers:
    """Of one call: which items are still to be answered."""

    def __init__(self, call: Call) -> None:
        self._first = call.first
        self._open = dict.fromkeys(range(len(call.request.items)))

    def take(self, response: pb.BatchResponse) -> Answer:
        """The outcome of one item."""
        del self._open[response.index]
        index = self._first + response.index
        if response.WhichOneof("outcome") == "error":
            return index, error_of_item(response.error.code, response.error.message)
        return index, results.completion(response.response)

    def rest(self, error: VivaceError) -> list[Answer]:
        """The same error for every item that has no answer."""
        return [(self._first + index, error) for index in self._open]


class _Readers:
    """Threads, each of which reads one call after another."""

    def __init__(self, calls: Sequence[Call], start: Start, num_threads: int) -> None:
        self.answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self._waiting = deque(calls)
        self._start = start
        self._running: list[Any] = []
        self._lock = (
            threading.RLock()
        )  # the collector may call `cancel` in a thread that begins a call
        self._is_closed = threading.Event()
        self._threads = [
            threading.Thread(target=self._work, daemon=True) for _ in calls[:num_threads]
        ]
        for thread in self._threads:
            thread.start()

    def cancel(self) -> None:
        """Cancel what runs, and begin no more."""
        with self._lock:
            self._is_closed.set()
            for stream in self._running:
                stream.cancel()

    def join(self) -> None:
        """Until all calls have ended."""
        for thread in self._threads:
            if thread is not threading.current_thread():  # where the collector runs
                thread.join()

    def _begin(self, request: pb.BatchRequest) -> Any:
        with self._lock:  # before the closing, which cancels it, or not at all
            if self._is_closed.is_set():
                raise closed()
            stream = self._start(request)
            if self._is_closed.is_set():  # meanwhile, by the collector
                stream.cancel()
                raise closed()
            self._running.append(stream)
            return stream

    def _work(self) -> None:
        try:
            while self._waiting:
                with suppress(IndexError):  # another thread was quicker
                    for answer in _read(self._waiting.popleft(), self._begin):
                        self.answers.put(answer)
        except BaseException:
            self.answers.put(None)
            raise


def run(calls: Sequence[Call], start: Start, max_parallel: int) -> Generator[Answer, None, None]:
    """Answers as they come, of so many calls at a time. Closing it cancels those that run."""
    _check_parallel(max_parallel)
    readers = _Readers(calls, start, max_parallel)
    try:
        for _ in range(sum(len(call.request.items) for call in calls)):
            answer = readers.answers.get()
            assert answer is not None, "a thread that reads answers has died"
            yield answer
    except BaseException:
        readers.cancel()
        raise
    finally:
        readers.join()


async def run_async(
    calls: Sequence[Call], start: Start, max_parallel: int
) -> AsyncGenerator[Answer]:
    """See `run`."""
    _check_parallel(max_parallel)
    answers: asyncio.Queue[Answer | None] = asyncio.Queue()
    free = asyncio.Semaphore(max_parallel)

    async def work(call: Call) -> None:
        try:
            async with free:
                async for answer in _read_async(call, start):
                    answers.put_nowait(answer)
        except BaseException:
            answers.put_nowait(None)
            raise

    tasks = [asyncio.create_task(work(call)) for call in calls]
    try:
        for _ in range(sum(len(call.request.items) for call in calls)):
            answer = await answers.get()
            assert answer is not None, "a task that reads answers has died"
            yield answer
    except BaseException:
        for task in tasks:
            task.cancel()
        raise
    finally:
        await asyncio.gather(*tasks, return_exceptions=True)


def _check_parallel(max_parallel: int) -> None:
    if max_parallel < 1:
        raise ValueError(f"max_parallel must be at least 1, got {max_parallel}")


def _read(call: Call, start: Start) -> Generator[Answer, None, None]:
    answers = _Answers(call)
    try:
        for response in start(call.request):
            yield answers.take(response)
    except VivaceError as error:
        yield from answers.rest(error)
    else:
        yield from answers.rest(error_of_item(*NO_ANSWER))


async def _read_async(call: Call, start: Start) -> AsyncGenerator[Answer]:
    answers = _Answers(call)
    try:
        async for response in start(call.request):
            yield answers.take(response)
        rest = answers.rest(error_of_item(*NO_ANSWER))
    except VivaceError as error:
        rest = answers.rest(error)
    except asyncio.CancelledError:
        if is_task_cancelled():
            raise
        rest = answers.rest(closed())
    for answer in rest:
        yield answer


def collect(answers: Iterable[Answer], total: int, progress: Progress | None) -> list[Outcome]:
    """All outcomes, in the order of the requests."""
    found: dict[int, Outcome] = {}
    for index, outcome in answers:
        found[index] = outcome
        if progress is not None:
            progress(len(found), total)
    return [found[index] for index in range(total)]


async def collect_async(
    answers: AsyncIterable[Answer], total: int, progress: Progress | None
) -> list[Outcome]:
    """See `collect`."""
    found: dict[int, Outcome] = {}
    async for index, outcome in answers:
        found[index] = outcome
        if progress is not None:
            progress(len(found), total)
    return [found[index] for index in range(total)]
