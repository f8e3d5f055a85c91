"""A server of one model for this process alone, behind a socket that no other user can open: what `vivace generate --model`
asks. It listens on no port and ends with the process.
"""

import asyncio
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path

import uvloop

from vivace.engine.config import Config, ServerConfig
from vivace.engine.runtimes.native import spawn
from vivace.serving.server import Console, Progress, Server


@contextmanager
def serving(config: Config, on_progress: Progress) -> Iterator[str]:
    """The target of a server that is ready. Raises what keeps the model from being served."""
    with (
        tempfile.TemporaryDirectory(prefix="vivace-") as directory,  # mode 0700
        Path(os.devnull).open("w") as log,
        ThreadPoolExecutor(1) as pool,
    ):
        target = f"unix:{directory}/server.sock"
        ready: Future[int] = Future()
        launches = {config.model.resolve().name: (config, spawn())}
        server = Server(
            ServerConfig(), launches, target, Console(log, on_progress, ready.set_result)
        )
        loop = uvloop.new_event_loop()
        ended = pool.submit(_run, loop, server)
        try:
            wait((ready, ended), return_when=FIRST_COMPLETED)
            if not ready.done():
                ended.result()
            yield target
        finally:
            with suppress(RuntimeError):  # it has ended, and its loop is closed
                loop.call_soon_threadsafe(server.stop)
                loop.call_soon_threadsafe(server.stop)  # now


def _run(loop: asyncio.AbstractEventLoop, server: Server) -> int:
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        return runner.run(server.serve())
