"""The requests that the server is working on: who may begin, who must end. Knows no model and no protobuf."""

import asyncio
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from vivace.engine.errors import Cancelled, EngineError, InvalidRequest, Overloaded
from vivace.serving.request_log import LogEntry, RequestLog
from vivace.serving.status import AlreadyExists, NotReady, SlowReader, status_of

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")  # goes into log lines: no line ends, no escapes
DEADLINE_SLACK_S = 0.05  # a client hangs up at its deadline, by its own clock
LOOKS_A_LIMIT = 10  # how often readers are looked at in the time that one may stall
MAX_ASIDE = 1024  # calls that run no model, at a time; each may hold a message of the largest size


@dataclass(eq=False, slots=True)
class Running:
    """A request from its first byte to its log line."""

    id: str
    deadline: float | None  # of `time.monotonic()`
    entry: LogEntry
    writing_since: float | None = None  # the client has not taken a message since then
    has_begun: bool = False  # its stream's initial metadata is out
    is_ending: bool = False  # its last message is on its way: nothing else may end it
    end: EngineError | None = None  # why the server ended it from outside

    async def write(
        self, context: grpc.aio.ServicerContext, message: Any, *, is_last: bool = False
    ) -> None:
        """Send a message; waits while the client does not read."""
        self.writing_since = time.monotonic()
        # All that are ready make their messages first: those that are sent one right after the other wake gRPC's thread once.
        await asyncio.sleep(0)
        if not self.has_begun:
            # By themselves: gRPC would send them with the first message, and once more with the status of a stream that is
            # cut during that message, which then never gets there.
            self.has_begun = True
            await context.send_initial_metadata(())
        self.is_ending = is_last
        await context.write(message)
        self.writing_since = None


class RunningRequests:
    """All of them. `max_requests` bounds what the front-end holds, and half of it is left to parts of what runs already; the
    engine has a bound of its own.
    """

    def __init__(self, log: RequestLog, *, max_requests: int) -> None:
        self._log = log
        self._max_requests = max_requests
        self._requests: dict[str, Running] = {}
        self._num_aside = 0  # of them
        # Not in `Running`: a task keeps the error that it ended with, that its frames, and they their `Running`. Such a ring
        # waits for the garbage collector, and a burst of refusals would make thousands.
        self._tasks: dict[str, asyncio.Task[Any]] = {}
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """Let nobody begin any more."""
        self._draining.set()

    async def wait_draining(self) -> None:
        """Until nobody may begin any more."""
        await self._draining.wait()

    async def wait_idle(self) -> None:
        """Until no request runs."""
        await self._idle.wait()

    def abort(self, request_id: str) -> bool:
        """End a request by its id, whatever it is doing. False if there is no such request."""
        running = self._requests.get(request_id)
        if running is None or running.is_ending or running.end is not None:
            return False
        self._cancel(running, Cancelled("aborted by its id"))
        return True

    def abort_all(self, error: EngineError) -> None:
        """End every request."""
        for running in list(self._requests.values()):
            if not running.is_ending:
                self._cancel(running, error)

    def _cancel(self, running: Running, error: EngineError) -> None:
        """End it with an error that is not its own fault."""
        running.end = error
        self._tasks[running.id].cancel()

    @contextmanager
    def run(
        self,
        rpc: str,
        request_id: str | None,
        deadline: float | None,
        *,
        is_part: bool = False,
    ) -> Iterator[Running]:
        """A request, run in the current task, with its log line. Raises what it ends with instead of a result.

        Parts of a request that runs already may begin while the server drains.
        `request_id` None: one is made. Raises InvalidRequest, AlreadyExists, Overloaded or NotReady before it begins.
        """
        name = secrets.token_hex(16) if request_id is None else request_id
        is_good_name = REQUEST_ID.fullmatch(name) is not None
        entry = LogEntry(id=name if is_good_name else "(bad)", rpc=rpc)
        running = Running(name, deadline, entry)
        try:
            if not is_good_name:
                raise InvalidRequest(
                    f"request_id must be 1..128 of [A-Za-z0-9._:-], got {name[:140]!r}"
                )
            self._admit(name, is_part=is_part)
            with self._registered(running):
                yield running
            entry.code = "OK"
        except asyncio.CancelledError:
            if running.end is None:
                entry.code = _why_ended(deadline)  # the client hung up, or its deadline passed
                raise
            if not running.is_ending:
                entry.code = status_of(running.end).name
                raise running.end from None
            entry.code = "OK"  # gRPC has its last message: a status would be a second final event
        except EngineError as error:
            entry.code = status_of(error).name
            raise
        finally:
            self._log.write(entry)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """A call that runs no model, in the current task: waited for and ended as requests are, with a bound of its own, and
        without an id or a log line. It may begin while the server drains. Raises Overloaded before it begins.
        """
        if self._num_aside >= MAX_ASIDE:
            raise Overloaded(f"{self._num_aside} calls that run no model are under way already")
        name = f"#{secrets.token_hex(16)}"  # no caller's id has a `#`
        running = Running(name, None, LogEntry(id=name, rpc=""))
        self._num_aside += 1
        try:
            with self._registered(running):
                yield
        except asyncio.CancelledError:
            if running.end is None:
                raise
            raise running.end from None
        finally:
            self._num_aside -= 1

    def _admit(self, request_id: str, *, is_part: bool) -> None:
        """Raises what a request is refused with."""
        if self._draining.is_set() and not is_part:
            raise NotReady("the server is draining")
        if request_id in self._requests:
            raise AlreadyExists(f"request_id {request_id!r} is in use")
        count = len(self._requests) - self._num_aside
        if count >= (self._max_requests if is_part else self._max_requests // 2):
            raise Overloaded(f"{count} requests are already running or waiting")

    @contextmanager
    def _registered(self, running: Running) -> Iterator[None]:
        task = asyncio.current_task()
        assert task is not None
        self._requests[running.id], self._tasks[running.id] = running, task
        self._idle.clear()
        try:
            yield
        finally:
            del self._requests[running.id], self._tasks[running.id]
            if not self._requests:
                self._idle.set()

    async def end_stalled(self, limit_s: float) -> None:
        """Ends whoever's client has not taken a message for so long. Never returns."""
        while True:
            await asyncio.sleep(limit_s / LOOKS_A_LIMIT)
            before = time.monotonic() - limit_s
            for running in list(self._requests.values()):
                since = running.writing_since
                if since is not None and since < before and running.end is None:
                    self._cancel(running, SlowReader(f"the client has not read for {limit_s:g} s"))


def _why_ended(deadline: float | None) -> str:
    """The status that the client sees of a call that gRPC ended from under us."""
    is_late = deadline is not None and deadline - time.monotonic() < DEADLINE_SLACK_S
    return "DEADLINE_EXCEEDED" if is_late else "CANCELLED"
