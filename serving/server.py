"""The server process: one port with the API, health and reflection in front of one engine a model. Starts, drains, gives
up: when one engine dies the process ends.
"""

import asyncio
import signal
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc

from vivace.engine import collector
from vivace.engine.chat import ChatEncoder
from vivace.engine.config import Config, ServerConfig
from vivace.engine.errors import ArtifactError, ConfigError, EngineDied
from vivace.engine.events import EngineInfo
from vivace.engine.models.generation_config import read_generation_defaults
from vivace.engine.runtimes.native import Child, NativeEngine
from vivace.engine.tokenizer import Tokenizer
from vivace.serving import reflection
from vivace.serving.boundary import Boundary
from vivace.serving.health import Health
from vivace.serving.models import Models, ServedModel
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb
from vivace.serving.protos.vivace.v1 import inference_pb2_grpc as pb_grpc
from vivace.serving.request_log import RequestLog, say
from vivace.serving.running import RunningRequests
from vivace.serving.servicer import InferenceServicer
from vivace.serving.status import NotReady

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
END_STREAMS_S = 0.5  # for streams to tell their clients how they ended
LOAD_ERROR_S = 0.5  # for a load to fail once its process has

Progress = Callable[[int, int], None]
Launch = tuple[Config, Child]  # what an engine is told, and its process


def check_address(config: ServerConfig) -> None:
    """Raise ConfigError for an address that cannot be bound."""
    family = socket.AF_INET6 if config.address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((str(config.address), config.port))
        except OSError as error:
            where = target_of(config.host, config.port)
            raise ConfigError(f"cannot listen on {where}: {error.strerror}") from error


@dataclass(frozen=True, slots=True)
class Console:
    """What the process shows of itself."""

    log: TextIO
    on_progress: Progress  # bytes of weights read, and in all
    on_ready: Callable[[int], None]  # gets the port


def run(config: ServerConfig, launches: Mapping[str, Launch], on_progress: Progress) -> int:
    """Serve models by name until a signal or an engine's death. Returns the exit status, 1 where requests were cut off;
    raises what kept it from serving.
    """

    def say_ready(port: int) -> None:
        collector.settle()
        where = target_of(config.host, port)
        print(f"vivace: serving {', '.join(launches)} on {where}", flush=True)

    async def serve() -> int:
        target = target_of(config.host, config.port)
        server = Server(config, launches, target, Console(sys.stderr, on_progress, say_ready))
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, server.stop)
        return await server.serve()

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(serve())


class Server:
    """Serves once, in one asyncio loop."""

    def __init__(
        self, config: ServerConfig, launches: Mapping[str, Launch], target: str, console: Console
    ) -> None:
        self._config = config
        self._launches = launches
        self._target = target
        self._console = console
        self._engines: dict[str, NativeEngine] = {}
        self._chats: dict[str, ChatEncoder] = {}
        self._models = Models(tuple(launches))
        limits = (engine.scheduler for engine, _ in launches.values())
        most = 2 * sum(limit.max_running + limit.max_waiting for limit in limits)
        self._running = RunningRequests(RequestLog(console.log), max_requests=most)
        self._health = Health((SERVICE,))
        self._stop = asyncio.Event()  # the first signal: drain
        self._abort = asyncio.Event()  # the second: end now

    async def serve(self) -> int:
        """See `run`."""
        bars = _join(self._console.on_progress, self._launches)
        try:
            for name, (config, child) in self._launches.items():
                self._engines[name] = await NativeEngine.start(config, bars[name], child=child)
            server, port = await self._listen()
            try:
                return await self._serve(port)
            finally:
                self._health.set(health_pb2.HealthCheckResponse.NOT_SERVING)
                self._running.abort_all(NotReady("the server has stopped"))
                await server.stop(END_STREAMS_S)
        finally:
            await close_all((*self._chats.values(), *self._engines.values()))

    async def _listen(self) -> tuple[grpc.aio.Server, int]:
        server = grpc_server(self._config)
        servicer = InferenceServicer(self._models, self._running)
        pb_grpc.add_InferenceServicer_to_server(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.add_to(server, (SERVICE, HEALTH))
        try:
            port = server.add_insecure_port(self._target)
        except RuntimeError as error:  # taken since `check_address` looked
            raise ConfigError(f"cannot listen on {self._target}") from error
        await server.start()
        return server, port

    async def _serve(self, port: int) -> int:
        stopped = asyncio.create_task(self._stop.wait())
        died = asyncio.create_task(self._died())
        ready = asyncio.create_task(self._load_all())
        readers = asyncio.create_task(self._running.end_stalled(self._config.stalled_reader_s))
        try:
            await asyncio.wait((ready, stopped, died), return_when=asyncio.FIRST_COMPLETED)
            if died.done():  # a load that failed says more than the death of its process
                await asyncio.wait((ready,), timeout=LOAD_ERROR_S)
            if ready.done():
                await ready
            elif not died.done():
                return 0  # told to stop while loading
            if not died.done():
                self._health.set(health_pb2.HealthCheckResponse.SERVING)
                self._console.on_ready(port)
                await asyncio.wait((stopped, died), return_when=asyncio.FIRST_COMPLETED)
            self._running.drain()
            self._health.set(health_pb2.HealthCheckResponse.NOT_SERVING)
            if died.done():
                raise EngineDied(died.result())
            return await self._drain(died)
        finally:
            await _cancel(stopped, died, ready, readers)

    async def _load_all(self) -> None:
        loads = [asyncio.create_task(self._load(name)) for name in self._launches]
        try:
            await asyncio.gather(*loads)
        finally:
            await _cancel(*loads)

    async def _load(self, name: str) -> None:
        engine, folder = self._engines[name], self._launches[name][0].model
        with _naming(name):
            tokenizer, info = await asyncio.gather(self._load_chat(name, folder), engine.info())
            defaults = read_generation_defaults(folder)
        if defaults.ignored:
            names = ", ".join(defaults.ignored)
            self._say(f"{name}: generation_config.json: not applied: {names}")
        self._say(f"{name}: {_summary(info)}")
        self._models.loaded[name] = ServedModel(
            name, engine, info, tokenizer, self._chats[name], defaults
        )

    async def _load_chat(self, name: str, folder: Path) -> Tokenizer:
        tokenizer = await asyncio.to_thread(Tokenizer.load, folder)
        chat = self._chats[name] = ChatEncoder(tokenizer)
        await chat.start()
        return tokenizer

    async def _died(self) -> str:
        """Wait for the first engine that dies; which one, and why."""
        waits = {asyncio.create_task(e.died()): name for name, e in self._engines.items()}
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            return next(f"model {name!r}: {t.result()}" for t, name in waits.items() if t.done())
        finally:
            await _cancel(*waits)

    async def _drain(self, died: "asyncio.Task[str]") -> int:
        idle = asyncio.create_task(self._running.wait_idle())
        abort = asyncio.create_task(self._abort.wait())
        try:
            await asyncio.wait(
                (idle, abort, died),
                timeout=self._config.drain_s,
                return_when=asyncio.FIRST_COMPLETED,
            )
            if idle.done():
                return 0
            if died.done():
                raise EngineDied(died.result())
            if not abort.done():
                limit = f"server.drain_s ({self._config.drain_s:g})"
                self._say(f"not all requests ended within {limit}; the others are cut off")
            return 1
        finally:
            await _cancel(idle, abort)

    def _say(self, text: str) -> None:
        say(f"vivace: {text}", self._console.log)

    def stop(self) -> None:
        """Drain and end; told again, end at once."""
        if self._stop.is_set():
            self._abort.set()
        self._stop.set()


def grpc_server(config: ServerConfig) -> grpc.aio.Server:
    """A server as the configuration has it, with nothing to serve yet."""
    options = (
        ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server
        ("grpc.max_receive_message_length", config.max_message_bytes),
        # gRPC refuses by chance between the two, which are one here.
        ("grpc.max_metadata_size", config.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", config.max_metadata_bytes),
        ("grpc.max_concurrent_streams", config.max_concurrent_streams),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.http2.max_ping_strikes", 0),
    )
    boundary = Boundary(max_metadata_bytes=config.max_metadata_bytes)
    return grpc.aio.server(options=options, interceptors=(boundary,))


def _join(on_progress: Progress, names: Iterable[str]) -> dict[str, Progress]:
    """One bar of several loads: bytes of all, once every total is known."""
    counts: dict[str, tuple[int, int]] = {}
    models = list(names)

    def bar(name: str) -> Progress:
        def show(done: int, total: int) -> None:
            counts[name] = (done, total)
            if len(counts) == len(models):
                on_progress(sum(d for d, _ in counts.values()), sum(t for _, t in counts.values()))

        return show

    return {name: bar(name) for name in models}


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors of one model say which one."""
    try:
        yield
    except (ArtifactError, ConfigError, EngineDied) as error:
        raise type(error)(f"model {name!r}: {error}") from error


async def close_all(what: Iterable[ChatEncoder | NativeEngine]) -> None:
    """Close each, whatever becomes of the others; then raise the first error."""
    ends = await asyncio.gather(*(one.close() for one in what), return_exceptions=True)
    for end in ends:
        if isinstance(end, BaseException):
            raise end


async def _cancel(*tasks: "asyncio.Task[Any]") -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _summary(info: EngineInfo) -> str:
    """What is served and what the machine's plan made of it, in one line."""
    of_isa = "" if info.isa is None else f" with {info.isa}"
    where = f"{info.threads} threads" if info.device == "cpu" else info.device
    return (
        f"{info.architecture}, {info.num_parameters:,} parameters: {info.weights}; "
        f"{info.backend} backend{of_isa}, {where}; context {info.max_context_tokens:,} tokens; "
        f"KV cache {info.num_blocks:,} blocks of {info.block_tokens} tokens in {info.kv_dtype} "
        f"({info.kv_bytes / 2**20:,.0f} MiB); loaded in {info.load_s:.2f} s"
    )


def target_of(host: str, port: int) -> str:
    """An address as gRPC has it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
