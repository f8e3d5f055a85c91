"""The engine in a process of its own: one thread runs the loop, another reads the socket.

The reader answers heartbeats itself, so they come in the middle of a step too, and it ends the process the moment the
front-end is gone, whatever the loop is doing. A bug in the loop ends the process: it does not limp.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue

import msgspec

from vivace.engine import core, wire
from vivace.engine.config import Config
from vivace.engine.core import EngineCore
from vivace.engine.errors import ArtifactError, EngineError

Load = Callable[[Config, Callable[[int, int], None]], EngineCore]
PROGRESS_S = 0.05  # between two reports while loading


class Channel:
    """Frames over a connected socket. `send` may be called from both threads."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._file = connected.makefile("rb")
        self._lock = threading.Lock()

    def send(self, frame: wire.FromEngine) -> None:
        """Blocks while the front-end does not read. Raises OSError when it is gone."""
        data = wire.encode(frame)
        with self._lock:
            self._socket.sendall(data)

    def receive(self) -> wire.ToEngine:
        """The next frame. Raises EOFError at the end, ValueError for garbage."""
        header = self._file.read(wire.HEADER.size)
        if len(header) < wire.HEADER.size:
            raise EOFError
        body = self._file.read(wire.body_bytes(header))
        return wire.decode_to_engine(body)


class Loop:
    """The engine loop. `beat` alone is called from the reader's thread."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._core: EngineCore | None = None
        self._is_busy = False
        self._last_report = 0.0
        self.inbox: SimpleQueue[wire.ToEngine] = SimpleQueue()

    def beat(self) -> wire.Beat:
        """How the loop is doing. While it loads it counts as not busy: that is watched by its own reports."""
        loaded = self._core
        return wire.Beat(self._is_busy, 0 if loaded is None else loaded.progress())

    def load(self, config: Config, load: Load) -> None:
        """Make the engine, or say why not and exit."""
        try:
            self._core = load(config, self._report)
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
                self._is_busy = True
                events = engine.step(time.monotonic())
                self._is_busy = False
                if events:
                    self._channel.send(wire.Events(events))

    def _take_frames(self, engine: EngineCore) -> bool:
        """Handle what has come; waits for something if there is no work. False: close."""
        try:
            frame = self.inbox.get(block=not engine.has_work)
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
                engine.abort(request_id)
            case wire.GetLoads(number):
                self._channel.send(wire.LoadsReply(number, engine.loads()))
            case wire.Close():
                return False
            case _:
                raise ValueError(f"{type(frame).__name__} is not for a running engine")
        return True

    def _report(self, done: int, total: int) -> None:
        now = time.monotonic()
        if done == total or now - self._last_report >= PROGRESS_S:
            self._last_report = now
            self._channel.send(wire.Loading(done, total))


def run(path: str, load: Load) -> None:
    """Connect to the front-end's socket, load what it says, serve until it closes or is gone."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # the terminal's Ctrl-C is the front-end's to handle
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connected.connect(path)
    channel = Channel(connected)
    start = channel.receive()
    if not isinstance(start, wire.Start):
        raise ValueError(f"expected Start, got {type(start).__name__}")
    loop = Loop(channel)
    threading.Thread(target=_read, args=(channel, loop), daemon=True).start()
    loop.load(start.config, load)
    loop.run()


def _read(channel: Channel, loop: Loop) -> None:
    """The reader's thread: never returns."""
    try:
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


if __name__ == "__main__":
    run(sys.argv[1], core.load)
