"""The native engine in its own process, as an `Engine`. Decides when that process counts as dead; computes nothing."""

import asyncio
import contextlib
import itertools
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from vivace.engine import wire
from vivace.engine.config import Config
from vivace.engine.errors import (
    ArtifactError,
    ConfigError,
    EngineDied,
    EngineError,
    InvalidRequest,
    Overloaded,
)
from vivace.engine.events import EngineInfo, EngineRequest, Loads, TokenEvent, TokenLogprobs

# -P: a file of the working folder must not pass for a module of the engine's.
COMMAND = (sys.executable, "-P", "-m", "vivace.engine.process")
ERRORS = {error.code: error for error in (InvalidRequest, Overloaded, ConfigError, ArtifactError)}
ACCEPT_S = 0.002  # between two looks for the process's connection
CLOSE_S = 2.0  # for the process to go by itself


@dataclass(frozen=True, slots=True)
class Watch:
    """How the process is watched: a ping every so often, how long it may show no life, and take to connect."""

    ping_s: float = 1.0
    silence_s: float = 10.0
    connect_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Child:
    """An engine process that has just been spawned, and the socket it will connect to."""

    process: subprocess.Popen[bytes]
    listener: socket.socket
    directory: Path  # holds the socket until the process has connected

    def discard(self) -> None:
        """End the process and leave nothing behind, before anybody owns it."""
        self.process.kill()
        self.process.wait()
        self.remove_socket()

    def remove_socket(self) -> None:
        """Let nobody connect any more. The process removes the same files: whoever comes second finds nothing."""
        self.listener.close()
        shutil.rmtree(self.directory, ignore_errors=True)


def spawn(command: Sequence[str] = COMMAND) -> Child:
    """Start an engine process. It imports while the caller does other things; `NativeEngine.start` takes it over."""
    directory = Path(tempfile.mkdtemp(prefix="vivace-"))  # mode 0700
    path = directory / "engine.sock"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _listen(listener, path)
        process = subprocess.Popen(
            [*command, str(path)], stdin=subprocess.DEVNULL, start_new_session=True
        )
    except BaseException:
        listener.close()
        shutil.rmtree(directory)
        raise
    return Child(process, listener, directory)


class _Stream:
    """Events of one request on their way to a consumer that may lag: what it has not taken yet reaches it as one."""

    def __init__(self) -> None:
        self.is_left = False  # nobody reads it any more; the engine has yet to end it
        self.ended = asyncio.Event()  # the engine has nothing more to say
        self._events: list[TokenEvent] = []
        self._prompt_logprobs: list[TokenLogprobs | None] = []  # of the event to come
        self._error: EngineError | None = None
        self._waiter: asyncio.Future[None] | None = None  # of who takes, while nothing has come

    def hold(self, piece: tuple[TokenLogprobs | None, ...]) -> None:
        if not self.is_left:
            self._prompt_logprobs += piece

    def put(self, event: TokenEvent) -> None:
        if event.finish is not None:
            self.ended.set()
        if self.is_left:
            return
        if self._prompt_logprobs:
            event = msgspec.structs.replace(event, prompt_logprobs=tuple(self._prompt_logprobs))
            self._prompt_logprobs.clear()
        self._events.append(event)
        self._wake()

    def fail(self, error: EngineError) -> None:
        self._error = error
        self.ended.set()
        self._wake()

    def leave(self) -> None:
        self.is_left = True
        self._events.clear()
        self._prompt_logprobs.clear()

    async def take(self) -> TokenEvent:
        """All that has come since the last one. Raises what the request failed with, once all events are taken."""
        if not self._events and self._error is None:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._events:
            events, self._events = self._events, []
            return events[0] if len(events) == 1 else _merged(events)
        assert self._error is not None
        raise self._error

    def _wake(self) -> None:
        # One that is done was cancelled, or is awake already.
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class NativeEngine:
    """See `vivace.engine.runtimes.Engine`."""

    def __init__(
        self,
        child: Child,
        *,
        on_progress: Callable[[int, int], None],
        watch: Watch,
    ) -> None:
        self._child = child
        self._process = child.process
        self._on_progress = on_progress
        self._watch = watch
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[EngineInfo] = loop.create_future()
        self._death: asyncio.Future[str] = loop.create_future()
        self._streams: dict[str, _Stream] = {}
        self._loads: dict[int, asyncio.Future[Loads]] = {}
        self._numbers = itertools.count()
        self._writer: asyncio.StreamWriter | None = None
        self._shows_life = True  # since the last ping
        self._last_progress = -1
        self._reaped: asyncio.Future[int] | None = None
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(
        cls,
        config: Config,
        on_progress: Callable[[int, int], None],
        *,
        child: Child | None = None,
        watch: Watch | None = None,
    ) -> "NativeEngine":
        """Own an engine process (a new one, if none is given) and return at once; it loads meanwhile."""
        child = child or spawn()
        engine = cls(child, on_progress=on_progress, watch=watch or Watch())
        engine._tasks.append(asyncio.create_task(engine._run(config)))
        return engine

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenEvent]:
        """Events of one request; see `Engine.generate`."""
        await self.info()
        request_id = request.request_id
        while (before := self._streams.get(request_id)) is not None:
            if not before.is_left:
                raise InvalidRequest(f"request_id {request_id!r} is in use")
            await before.ended.wait()  # its last event must not pass for one of ours
        self._send(wire.Add(request))
        stream = self._streams[request_id] = _Stream()
        try:
            is_finished = False
            while not is_finished:
                event = await stream.take()
                is_finished = event.finish is not None
                yield event
        finally:
            if not stream.ended.is_set():
                stream.leave()
                self._send(wire.Abort(request_id))

    async def abort(self, request_id: str) -> bool:
        """End a request early; see `Engine.abort`."""
        stream = self._streams.get(request_id)
        if stream is None or stream.is_left:
            return False
        self._send(wire.Abort(request_id))
        return True

    async def info(self) -> EngineInfo:
        """What is served, once it is; see `Engine.info`."""
        if self._death.done():
            if self._ready.done() and (error := self._ready.exception()) is not None:
                raise error
            raise EngineDied(self._death.result())
        return await asyncio.shield(self._ready)

    async def loads(self) -> Loads:
        """How busy it is; see `Engine.loads`."""
        await self.info()
        number = next(self._numbers)
        reply = self._loads[number] = asyncio.get_running_loop().create_future()
        try:
            self._send(wire.GetLoads(number))
            loads: Loads = await reply
            return loads
        finally:
            del self._loads[number]

    async def died(self) -> str:
        """Wait until the process is gone or silent; see `Engine.died`."""
        return await asyncio.shield(self._death)

    async def close(self) -> None:
        """End the process, kindly first. Idempotent. Raises what went wrong on this side, if that ended the engine."""
        if not self._death.done() and self._writer is not None:
            self._send(wire.Close())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._death), CLOSE_S)
        self._die("the engine was closed")
        for task in self._tasks:
            task.cancel()
        ends = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._child.remove_socket()  # a task cancelled before its first step has not
        if self._reaped is not None:
            await self._reaped
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def _run(self, config: Config) -> None:
        """Own the process from its connection to its death."""
        try:
            reader = await self._connect()
            self._send(wire.Start(config))
            self._tasks.append(asyncio.create_task(self._ping()))
            while True:
                header = await reader.readexactly(wire.HEADER.size)
                body = await reader.readexactly(wire.body_bytes(header))
                self._handle(wire.decode_from_engine(body))
        except (EOFError, OSError):
            self._die(await self._exit_reason())
        except (ValueError, msgspec.MsgspecError) as error:
            self._die(f"the engine process sent garbage: {error}")
        finally:
            self._die("the front-end has failed")  # a bug on this side: `close` raises it

    async def _connect(self) -> asyncio.StreamReader:
        """Take the one connection; afterwards nothing is left in the file system."""
        loop = asyncio.get_running_loop()
        end = loop.time() + self._watch.connect_s
        try:
            while True:
                with contextlib.suppress(BlockingIOError):
                    connected, _ = self._child.listener.accept()
                    break
                if self._process.poll() is not None:
                    raise EOFError
                if loop.time() >= end:
                    self._die(f"the engine process did not connect in {self._watch.connect_s:g} s")
                    raise EOFError
                await asyncio.sleep(ACCEPT_S)
        finally:
            self._child.remove_socket()
        reader, self._writer = await asyncio.open_unix_connection(sock=connected)
        return reader

    def _handle(self, frame: wire.FromEngine) -> None:
        self._note_life(frame)
        match frame:
            case wire.Events(events):
                for event in events:
                    self._put(event)
            case wire.PromptLogprobs(request_id, piece):
                if (stream := self._streams.get(request_id)) is not None:
                    stream.hold(piece)
            case wire.Refused(request_id, code, message):
                if (stream := self._streams.pop(request_id, None)) is not None:
                    stream.fail(ERRORS[code](message))
            case wire.LoadsReply(number, loads):
                if (reply := self._loads.get(number)) is not None and not reply.done():
                    reply.set_result(loads)
            case _:
                self._handle_start(frame)

    def _handle_start(self, frame: wire.FromEngine) -> None:
        match frame:
            case wire.Loading(done, total):
                self._on_progress(done, total)
            case wire.Ready(info):
                self._ready.set_result(info)
            case wire.Failed(code, message):
                self._ready.set_exception(ERRORS[code](message))

    def _put(self, event: TokenEvent) -> None:
        if (stream := self._streams.get(event.request_id)) is not None:
            stream.put(event)
            if event.finish is not None:
                del self._streams[event.request_id]

    def _note_life(self, frame: wire.FromEngine) -> None:
        """A heartbeat from a busy loop counts only if the loop gets on."""
        if isinstance(frame, wire.Beat):
            if frame.is_busy and frame.progress == self._last_progress:
                return
            self._last_progress = frame.progress
        self._shows_life = True

    async def _ping(self) -> None:
        """Counts pings, not time: where this side stalled, what the process said meanwhile has yet to be read."""
        silence_s = 0.0
        while silence_s < self._watch.silence_s and not self._death.done():
            self._shows_life = False
            self._send(wire.Ping())
            await asyncio.sleep(self._watch.ping_s)
            silence_s = 0.0 if self._shows_life else silence_s + self._watch.ping_s
        self._die(f"the engine process has been silent for {silence_s:.1f} s")

    def _send(self, frame: wire.ToEngine) -> None:
        if self._death.done() or self._writer is None:
            raise EngineDied("the engine process is gone")
        self._writer.write(wire.encode(frame))

    async def _exit_reason(self) -> str:
        """How the process ended; its socket closes a moment before it can be waited for."""
        for _ in range(200):
            if self._process.poll() is not None:
                return f"the engine process {_end_of(self._process.returncode)}"
            await asyncio.sleep(0.01)
        return "the engine process closed its socket"

    def _die(self, reason: str) -> None:
        """Nothing comes from this process any more: everyone who waits for it is told, and it is reaped."""
        if self._death.done():
            return
        self._death.set_result(reason)
        error = EngineDied(reason)
        self._process.kill()
        # In a thread: a process with much memory takes a while to go.
        self._reaped = asyncio.get_running_loop().run_in_executor(None, self._process.wait)
        if not self._ready.done():
            self._ready.set_exception(error)
        self._ready.exception()  # marks it as seen: who asks later is told again
        for stream in self._streams.values():
            stream.fail(error)
        self._streams.clear()
        for reply in self._loads.values():
            if not reply.done():
                reply.set_exception(error)
        if self._writer is not None:
            self._writer.close()


def _listen(listener: socket.socket, path: Path) -> None:
    """Let this user alone connect."""
    listener.bind(str(path))  # in a directory of mode 0700: nobody can connect before the next line
    path.chmod(0o600)
    listener.listen(1)
    listener.setblocking(False)


def _end_of(status: int) -> str:
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _merged(events: list[TokenEvent]) -> TokenEvent:
    return msgspec.structs.replace(
        events[-1],
        token_ids=tuple(token for event in events for token in event.token_ids),
        logprobs=tuple(entry for event in events for entry in event.logprobs),
        prompt_logprobs=tuple(entry for event in events for entry in event.prompt_logprobs),
    )
