"""The engine in a process of its own: one thread runs the loop, another reads the socket.

The reader answers heartbeats itself, so they come in the middle of a step too, and it ends the process the moment the
front-end is gone, whatever the loop is doing. A bug in the loop ends the process: it does not limp.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from queue import Empty, SimpleQueue

import msgspec

from vivace.engine import collector, core, wire
from vivace.engine.config import Config
from vivace.engine.core import EngineCore
from vivace.engine.errors import ArtifactError, EngineError
from vivace.engine.events import TokenEvent

Load = Callable[[Config, Callable[[int, int], None]], EngineCore]
PROGRESS_S = 0.05  # between two reports while loading


class Channel:
    """Frames over a connected socket. `send` may be called from both threads."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._file = connected.makefile("rb")
        self._lock = threading.Lock()

    def send(self, frame: wire.FromEngine) -> None:
        """Blocks while the front-end does not read. Ends the process when it is gone."""
        data = wire.encode(frame)
        try:
            with self._lock:
                self._socket.sendall(data)
        except OSError:
            os._exit(0)

    def receive(self) -> wire.ToEngine:
        """The next frame. Raises EOFError or OSError at the end, ValueError or MsgspecError for garbage."""
        return wire.decode_to_engine(self._read(wire.body_bytes(self._read(wire.HEADER.size))))

    def _read(self, num_bytes: int) -> bytes:
        data = self._file.read(num_bytes)
        if len(data) < num_bytes:
            raise EOFError
        return data


class Loop:
    """The engine loop. `beat` alone is called from the reader's thread."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._core: EngineCore | None = None
        self._is_busy = False
        self._num_rounds = 0
        self._last_report = 0.0
        # Bounded by the front-end: it has a bound on calls, and each has few requests here at a time (serving/models.py).
        # Every round empties it, and the engine refuses at once what its own queue has no room for.
        self.inbox: SimpleQueue[wire.ToEngine] = SimpleQueue()

    def beat(self) -> wire.Beat:
        """How the loop is doing. Loading counts as waiting: nothing says how long one read may take."""
        loaded = self._core
        num_ops = 0 if loaded is None else loaded.progress()
        return wire.Beat(self._is_busy, self._num_rounds + num_ops)

    def load(self, load: Load) -> None:
        """Make the engine that the first frame asks for, or say why not and exit."""
        start = self.inbox.get()
        assert isinstance(start, wire.Start)
        try:
            self._core = load(start.config, self._report)
        except (EngineError, OSError) as error:
            code = error.code if isinstance(error, EngineError) else ArtifactError.code
            self._channel.send(wire.Failed(code, str(error)))
            sys.exit(1)
        self._channel.send(wire.Ready(self._core.info))

    def run(self) -> None:
        """Serve until told to close."""
        engine = self._core
        assert engine is not None
        while self._take_frames(engine):
            if engine.has_work:
                self._send_events(engine.step(time.monotonic()))
            self._num_rounds += 1

    def _take_frames(self, engine: EngineCore) -> bool:
        """Handle what has come; waits for something if there is no work. False: close."""
        try:
            self._is_busy = engine.has_work
            frame = self.inbox.get(block=not self._is_busy)
            self._is_busy = True
            while self._handle(engine, frame):
                frame = self.inbox.get(block=False)
        except Empty:
            return True
        return False

    def _handle(self, engine: EngineCore, frame: wire.ToEngine) -> bool:
        match frame:
            case wire.Add(request):
                try:
                    engine.add(request, time.monotonic())
                except EngineError as error:
                    refused = wire.Refused(request.request_id, error.code, str(error))
                    self._channel.send(refused)
            case wire.Abort(request_id):
                engine.abort(request_id, time.monotonic())
            case wire.GetLoads(number):
                self._channel.send(wire.LoadsReply(number, engine.loads()))
            case wire.Close():
                return False
            case _:
                raise ValueError(f"{type(frame).__name__} is not for a running engine")
        return True

    def _send_events(self, events: list[TokenEvent]) -> None:
        for i, event in enumerate(events):
            if event.prompt_logprobs:
                for start in range(0, len(event.prompt_logprobs), wire.PIECE_POSITIONS):
                    piece = event.prompt_logprobs[start : start + wire.PIECE_POSITIONS]
                    self._channel.send(wire.PromptLogprobs(event.request_id, piece))
                events[i] = msgspec.structs.replace(event, prompt_logprobs=())
        if events:
            self._channel.send(wire.Events(events))

    def _report(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last_report >= PROGRESS_S:
            self._last_report = now
            self._channel.send(wire.Loading(done, total))


def run(path: str, load: Load) -> None:
    """Connect to the front-end's socket, load what it says, serve until it closes or is gone."""
    # Both are the front-end's to handle: a terminal and a service manager may send them to the whole group.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    channel = Channel(_connect(Path(path)))
    loop = Loop(channel)
    threading.Thread(target=_read, args=(channel, loop), daemon=True).start()
    loop.load(load)
    collector.settle()
    loop.run()


def _connect(path: Path) -> socket.socket:
    """Nobody connects twice: the socket and its directory go, even if the front-end died before it could remove them."""
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connected.connect(str(path))
    except OSError as error:
        sys.exit(f"vivace: engine: the front-end is gone: {error}")
    finally:
        if path.is_socket():
            with contextlib.suppress(OSError):  # the front-end does the same
                path.unlink()
                path.parent.rmdir()
    return connected


def _read(channel: Channel, loop: Loop) -> None:
    """The reader's thread: never returns."""
    try:
        loop.inbox.put(_first(channel))
        while True:
            frame = channel.receive()
            if isinstance(frame, wire.Ping):
                channel.send(loop.beat())
            else:
                loop.inbox.put(frame)
    except (EOFError, OSError):
        os._exit(0)  # the front-end is gone; nobody waits for this step's result
    except (ValueError, msgspec.MsgspecError) as error:
        print(f"vivace: engine: bad frame: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def _first(channel: Channel) -> wire.Start:
    frame = channel.receive()
    if not isinstance(frame, wire.Start):
        raise ValueError(f"the first must be Start, got {type(frame).__name__}")
    return frame


if __name__ == "__main__":
    run(sys.argv[1], core.load)
