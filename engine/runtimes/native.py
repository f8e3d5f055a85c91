"""The native engine in its own process, as an `Engine`. Decides when that process counts as dead; computes nothing."""

import asyncio
import contextlib
import itertools
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, replace
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
from vivace.engine.events import EngineInfo, EngineRequest, Loads, TokenEvent

COMMAND = (sys.executable, "-m", "vivace.engine.process")
ERRORS = {error.code: error for error in (InvalidRequest, Overloaded, ConfigError, ArtifactError)}
CLOSE_S = 2.0  # for the process to go by itself


@dataclass(frozen=True, slots=True)
class Watch:
    """How the process is watched: a ping every so often, and how long it may show no life."""

    ping_s: float = 1.0
    silence_s: float = 10.0


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
        self.listener.close()
        shutil.rmtree(self.directory)


def spawn(command: Sequence[str] = COMMAND) -> Child:
    """Start an engine process. It imports while the caller does other things; `NativeEngine.start` takes it over."""
    directory = Path(tempfile.mkdtemp(prefix="vivace-"))  # mode 0700
    path = directory / "engine.sock"
    try:
        listener = _listen(path)
        process = subprocess.Popen(
            [*command, str(path)], stdin=subprocess.DEVNULL, start_new_session=True
        )
    except BaseException:
        shutil.rmtree(directory)
        raise
    return Child(process, listener, directory)


class _Stream:
    """Events of one request on their way to a consumer that may lag: what it has not taken yet is merged into one."""

    def __init__(self) -> None:
        self._event: TokenEvent | None = None
        self._error: EngineError | None = None
        self._changed = asyncio.Event()

    def put(self, event: TokenEvent) -> None:
        self._event = event if self._event is None else _merged(self._event, event)
        self._changed.set()

    def fail(self, error: EngineError) -> None:
        self._error = error
        self._changed.set()

    async def take(self) -> TokenEvent:
        """The next event. Raises what the request failed with."""
        await self._changed.wait()
        self._changed.clear()
        if self._event is None:
            assert self._error is not None
            raise self._error
        event, self._event = self._event, None
        if self._error is not None:
            self._changed.set()
        return event


class NativeEngine:
    """See `vivace.engine.runtimes.Engine`."""

    def __init__(
        self,
        process: subprocess.Popen[bytes],
        *,
        on_progress: Callable[[int, int], None],
        watch: Watch,
    ) -> None:
        self._process = process
        self._on_progress = on_progress
        self._watch = watch
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[EngineInfo] = loop.create_future()
        self._death: asyncio.Future[str] = loop.create_future()
        self._streams: dict[str, _Stream] = {}
        self._loads: dict[int, asyncio.Future[Loads]] = {}
        self._numbers = itertools.count()
        self._writer: asyncio.StreamWriter | None = None
        self._last_life = loop.time()
        self._last_progress = -1
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
        engine = cls(child.process, on_progress=on_progress, watch=watch or Watch())
        engine._tasks.append(asyncio.create_task(engine._run(config, child)))
        return engine

    async def generate(self, request: EngineRequest) -> AsyncGenerator[TokenEvent]:
        """Events of one request; see `Engine.generate`."""
        await self.info()
        request_id = request.request_id
        if request_id in self._streams:
            raise InvalidRequest(f"request_id {request_id!r} is in use")
        stream = self._streams[request_id] = _Stream()
        is_finished = False
        try:
            self._send(wire.Add(request))
            while not is_finished:
                event = await stream.take()
                is_finished = event.finish is not None
                yield event
        except EngineError:
            is_finished = True
            raise
        finally:
            del self._streams[request_id]
            if not is_finished and not self._death.done():
                self._send(wire.Abort(request_id))

    async def abort(self, request_id: str) -> bool:
        """End a request early; see `Engine.abort`."""
        if request_id not in self._streams or self._death.done():
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
        """End the process, kindly first. Idempotent."""
        if not self._death.done() and self._writer is not None:
            self._send(wire.Close())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(self._death), CLOSE_S)
        self._die("the engine was closed")
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _run(self, config: Config, child: Child) -> None:
        """Own the process from its connection to its death."""
        try:
            reader = await self._connect(child)
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

    async def _connect(self, child: Child) -> asyncio.StreamReader:
        """Take the one connection; afterwards nothing is left in the file system."""
        loop = asyncio.get_running_loop()
        accept = asyncio.ensure_future(loop.sock_accept(child.listener))
        try:
            while not accept.done():
                await asyncio.wait([accept], timeout=0.02)
                if self._process.poll() is not None and not accept.done():
                    raise EOFError
            connected, _ = accept.result()
        finally:
            accept.cancel()
            child.listener.close()
            shutil.rmtree(child.directory)
        reader, self._writer = await asyncio.open_unix_connection(sock=connected)
        return reader

    def _handle(self, frame: wire.FromEngine) -> None:
        self._note_life(frame)
        match frame:
            case wire.Events(events):
                for event in events:
                    if (stream := self._streams.get(event.request_id)) is not None:
                        stream.put(event)
            case wire.Refused(request_id, code, message):
                if (stream := self._streams.get(request_id)) is not None:
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

    def _note_life(self, frame: wire.FromEngine) -> None:
        """A heartbeat from inside a step counts only if the step goes on."""
        if isinstance(frame, wire.Beat):
            if frame.is_busy and frame.progress == self._last_progress:
                return
            self._last_progress = frame.progress
        self._last_life = asyncio.get_running_loop().time()

    async def _ping(self) -> None:
        while not self._death.done():
            self._send(wire.Ping())
            await asyncio.sleep(self._watch.ping_s)
            silence = asyncio.get_running_loop().time() - self._last_life
            if silence > self._watch.silence_s:
                self._die(f"the engine process has been silent for {silence:.1f} s")

    def _send(self, frame: wire.ToEngine) -> None:
        if self._death.done() or self._writer is None:
            raise EngineDied("the engine process is gone")
        self._writer.write(wire.encode(frame))

    async def _exit_reason(self) -> str:
        """How the process ended; its socket closes a moment before it can be waited for."""
        for _ in range(50):
            if self._process.poll() is not None:
                return f"the engine process ended with status {self._process.returncode}"
            await asyncio.sleep(0.01)
        return "the engine process closed its socket"

    def _die(self, reason: str) -> None:
        """Nothing comes from this process any more: everyone who waits for it is told, and it is reaped."""
        if self._death.done():
            return
        self._death.set_result(reason)
        error = EngineDied(reason)
        self._process.kill()
        self._process.wait()
        if not self._ready.done():
            self._ready.set_exception(error)
        self._ready.exception()  # marks it as seen: who asks later is told again
        for stream in self._streams.values():
            stream.fail(error)
        for reply in self._loads.values():
            if not reply.done():
                reply.set_exception(error)
        if self._writer is not None:
            self._writer.close()


def _listen(path: Path) -> socket.socket:
    """A socket that this user alone may connect to."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))  # in a directory of mode 0700: nobody can connect before the next line
    path.chmod(0o600)
    listener.listen(1)
    listener.setblocking(False)
    return listener


def _merged(first: TokenEvent, second: TokenEvent) -> TokenEvent:
    return replace(
        second,
        token_ids=first.token_ids + second.token_ids,
        logprobs=first.logprobs + second.logprobs,
        prompt_logprobs=first.prompt_logprobs + second.prompt_logprobs,
    )
