"""The server process: one port with the API, health and reflection in front of one engine. Starts, drains, gives up."""

import asyncio
import ipaddress
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import dataclass

import grpc
import uvloop
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer

from vivace.engine.config import Config
from vivace.engine.errors import ConfigError, EngineDied
from vivace.engine.events import EngineInfo
from vivace.engine.models.generation_config import read_generation_defaults
from vivace.engine.runtimes.native import Child, NativeEngine
from vivace.engine.tokenizer import Tokenizer
from vivace.serving import reflection
from vivace.serving.boundary import Boundary
from vivace.serving.models import Models, ServedModel
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb
from vivace.serving.protos.vivace.v1 import inference_pb2_grpc as pb_grpc
from vivace.serving.request_log import RequestLog
from vivace.serving.running import RunningRequests
from vivace.serving.servicer import InferenceServicer

SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
STALLED_READER_S = 30  # how long a client may not read its stream
END_STREAMS_S = 0.5  # for streams to tell their clients how they ended
OPTIONS = (
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a second server
    ("grpc.max_receive_message_length", 4 << 20),
    ("grpc.max_metadata_size", 16 << 10),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 0),
)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Where to serve, and under which name."""

    host: str
    port: int  # 0: any that is free
    name: str
    insecure: bool = False  # allows addresses off loopback, which anybody on the network can reach


def check_address(config: ServerConfig) -> None:
    """Raise ConfigError for an address off loopback without `insecure`, or one that cannot be bound."""
    try:
        address = ipaddress.ip_address("127.0.0.1" if config.host == "localhost" else config.host)
    except ValueError as error:
        raise ConfigError(f"host must be an IP address, got {config.host!r}") from error
    if not address.is_loopback and not config.insecure:
        raise ConfigError(
            f"{config.host} can be reached from the network, without encryption or authentication; "
            "use a loopback address, or --insecure if that is meant"
        )
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((str(address), config.port))
        except (OSError, OverflowError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(f"cannot listen on {config.host}:{config.port}: {reason}") from error


def run(
    config: ServerConfig,
    engine_config: Config,
    child: Child,
    *,
    on_progress: Callable[[int, int], None],
) -> int:
    """Serve until a signal or the engine's death. Returns the exit status; raises what kept it from serving."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(Server(config, engine_config, on_progress).serve(child))


class Server:
    """Lives as long as the process."""

    def __init__(
        self, config: ServerConfig, engine_config: Config, on_progress: Callable[[int, int], None]
    ) -> None:
        self._config = config
        self._engine_config = engine_config
        self._on_progress = on_progress
        self._models = Models((config.name,))
        scheduler = engine_config.scheduler
        most = 2 * (scheduler.max_running + scheduler.max_waiting)
        self._running = RunningRequests(RequestLog(), max_requests=most)
        self._health = HealthServicer()
        self._stop = asyncio.Event()  # the first signal: drain
        self._abort = asyncio.Event()  # the second: end now

    async def serve(self, child: Child) -> int:
        """See `run`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        engine = await NativeEngine.start(self._engine_config, self._on_progress, child=child)
        try:
            server, port = await self._listen()
            try:
                return await self._serve(engine, port)
            finally:
                await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
                await server.stop(0 if self._abort.is_set() else END_STREAMS_S)
        finally:
            await engine.close()

    async def _listen(self) -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server(options=OPTIONS, interceptors=(Boundary(SERVICE),))
        servicer = InferenceServicer(self._models, self._running)
        pb_grpc.add_InferenceServicer_to_server(servicer, server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.add_to(server, (SERVICE, HEALTH))
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        target = _target(self._config.host, self._config.port)
        try:
            port = server.add_insecure_port(target)
        except RuntimeError as error:  # taken since `check_address` looked
            raise ConfigError(f"cannot listen on {target}") from error
        await server.start()
        return server, port

    async def _serve(self, engine: NativeEngine, port: int) -> int:
        stopped = asyncio.create_task(self._stop.wait())
        died = asyncio.create_task(engine.died())
        ready = asyncio.create_task(self._load(engine))
        readers = asyncio.create_task(self._running.end_stalled(STALLED_READER_S))
        try:
            await asyncio.wait((ready, stopped), return_when=asyncio.FIRST_COMPLETED)
            if not ready.done():
                return 0  # told to stop while loading
            await ready
            await self._set_health(health_pb2.HealthCheckResponse.SERVING)
            where = _target(self._config.host, port)
            print(f"vivace: serving {self._config.name} on {where}", flush=True)
            await asyncio.wait((stopped, died), return_when=asyncio.FIRST_COMPLETED)
            await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
            self._running.drain()
            if not died.done():
                return await self._drain(died)
            raise EngineDied(died.result())
        finally:
            for task in (stopped, died, ready, readers):
                task.cancel()
            await asyncio.gather(stopped, died, ready, readers, return_exceptions=True)

    async def _load(self, engine: NativeEngine) -> None:
        directory = self._engine_config.model
        tokenizer = await asyncio.to_thread(Tokenizer.load, directory)
        defaults = read_generation_defaults(directory)
        info = await engine.info()
        if defaults.ignored:
            names = ", ".join(defaults.ignored)
            print(f"vivace: generation_config.json: not applied: {names}", file=sys.stderr)
        print(f"vivace: {_summary(info)}", file=sys.stderr, flush=True)
        name = self._config.name
        self._models.loaded[name] = ServedModel(name, engine, info, tokenizer, defaults)

    async def _drain(self, died: "asyncio.Task[str]") -> int:
        idle = asyncio.create_task(self._running.wait_idle())
        abort = asyncio.create_task(self._abort.wait())
        await asyncio.wait((idle, abort, died), return_when=asyncio.FIRST_COMPLETED)
        is_done = idle.done()
        for task in (idle, abort):
            task.cancel()
        await asyncio.gather(idle, abort, return_exceptions=True)
        if died.done() and not is_done:
            raise EngineDied(died.result())
        return 0 if is_done else 1

    async def _set_health(self, status: int) -> None:
        for service in ("", SERVICE):
            await self._health.set(service, status)

    def _on_signal(self) -> None:
        if self._stop.is_set():
            self._abort.set()
        self._stop.set()


def _summary(info: EngineInfo) -> str:
    """What is served and what the machine's plan made of it, in one line."""
    return (
        f"{info.architecture}, {info.num_parameters:,} parameters in {info.dtype}; "
        f"{info.backend} backend, {info.threads} threads; context {info.max_context_tokens:,} tokens; "
        f"KV cache {info.num_blocks:,} blocks of {info.block_tokens} tokens in {info.kv_dtype} "
        f"({info.kv_bytes / 2**20:,.0f} MiB); loaded in {info.load_s:.2f} s"
    )


def _target(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
