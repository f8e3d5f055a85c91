"""What the service costs beside its engine: our front-end over an engine that answers at once, against a bare echo.

Three processes: this one is the load generator, the same for both, and reads messages without parsing them; the two
servers (`frontend_server.py`) are called in turn. The CPU of each says which one the rate hangs on.
"""

import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO

import grpc
import uvloop

from vivace.bench.frontend_server import HOST
from vivace.bench.result import Figure, figure
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb

COMMAND = (sys.executable, "-P", "-m", "vivace.bench.frontend_server")
SERVICE = f"/{pb.DESCRIPTOR.services_by_name['Inference'].full_name}"
PROMPT = "How many days does delivery take?"
STOP_S = 10


@dataclass(frozen=True, slots=True)
class Load:
    """How much is asked of both, in each round."""

    rounds: int
    streams: int  # at a time
    messages: int  # of each
    calls: int  # of one token, one after another; their median counts


@dataclass(frozen=True, slots=True)
class Server:
    """A process that serves."""

    orders: IO[str]
    answers: IO[str]
    port: int

    def cpu_s(self) -> float:
        """CPU time of all its threads so far."""
        print(file=self.orders, flush=True)
        return float(self.answers.readline())


@dataclass(frozen=True, slots=True)
class Target:
    """A server and a connection to it."""

    server: Server
    channel: grpc.aio.Channel

    async def stream(self, num_tokens: int) -> int:
        """Messages of one Generate."""
        call = self.channel.unary_stream(f"{SERVICE}/Generate")(_request(num_tokens))
        return sum([1 async for _ in call])

    async def first_ms(self) -> float:
        """Until the first message of a Generate."""
        start = time.perf_counter()
        call = self.channel.unary_stream(f"{SERVICE}/Generate")(_request(1))
        await call.read()
        taken = time.perf_counter() - start
        await call.read()
        return taken * 1e3

    async def unary_ms(self) -> float:
        """A GenerateUnary of one token."""
        start = time.perf_counter()
        await self.channel.unary_unary(f"{SERVICE}/GenerateUnary")(_request(1))
        return (time.perf_counter() - start) * 1e3


@dataclass(frozen=True, slots=True)
class Streams:
    """One round of concurrent streams."""

    rate: float  # messages/s
    server_us: float  # of CPU, a message
    client_us: float


def measure(model: Path, load: Load) -> list[Figure]:
    """Rates, latencies and CPU of both, and their ratios round by round. The first round warms up and is not counted."""
    with (
        _server("service", model) as service,
        _server("echo", model) as echo,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(_measure((service, echo), load))


async def _measure(servers: Sequence[Server], load: Load) -> list[Figure]:
    async with AsyncExitStack() as stack:
        targets = [
            Target(
                one,
                await stack.enter_async_context(grpc.aio.insecure_channel(f"{HOST}:{one.port}")),
            )
            for one in servers
        ]
        rounds = range(load.rounds + 1)
        streams = [[await _streams(one, load) for one in targets] for _ in rounds][1:]
        unary = [[await _median_ms(one.unary_ms, load) for one in targets] for _ in rounds][1:]
        first = [[await _median_ms(one.first_ms, load) for one in targets] for _ in rounds][1:]
    name = f"{load.streams} streams"
    return [
        *_pair(f"{name}, messages/s", [(a.rate, b.rate) for a, b in streams]),
        *_pair(
            f"{name}, server CPU us a message", [(a.server_us, b.server_us) for a, b in streams]
        ),
        *(
            figure(f"{name} of {whose}, CPUs kept busy by {what}", values)
            for whose, i in (("service", 0), ("echo", 1))
            for what, values in (
                ("server", [one[i].rate * one[i].server_us / 1e6 for one in streams]),
                ("load", [one[i].rate * one[i].client_us / 1e6 for one in streams]),
            )
        ),
        *_pair("GenerateUnary of one token, ms", unary),
        *_pair("Generate to the first message, ms", first),
    ]


def _pair(name: str, rounds: Sequence[Sequence[float]]) -> list[Figure]:
    """Of the service and of the echo, and their ratio round by round."""
    what, _, unit = name.rpartition(", ")
    return [
        figure(f"service, {name}", [a for a, _ in rounds]),
        figure(f"echo, {name}", [b for _, b in rounds]),
        figure(
            f"ratio, {what}, {unit}" if "CPU" in unit else f"ratio, {what}",
            [a / b for a, b in rounds],
        ),
    ]


async def _streams(target: Target, load: Load) -> Streams:
    cpu, own, start = target.server.cpu_s(), time.process_time(), time.perf_counter()
    counts = await asyncio.gather(*(target.stream(load.messages) for _ in range(load.streams)))
    wall = time.perf_counter() - start
    total = sum(counts)
    assert total == load.streams * load.messages
    return Streams(
        rate=total / wall,
        server_us=(target.server.cpu_s() - cpu) * 1e6 / total,
        client_us=(time.process_time() - own) * 1e6 / total,
    )


async def _median_ms(call: Callable[[], Awaitable[float]], load: Load) -> float:
    return median([await call() for _ in range(load.calls)])


def _request(num_tokens: int) -> bytes:
    sampling = pb.SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return pb.GenerateRequest(text=PROMPT, sampling=sampling).SerializeToString()


@contextmanager
def _server(kind: str, model: Path) -> Iterator[Server]:
    with subprocess.Popen(
        [*COMMAND, kind, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield Server(process.stdin, process.stdout, int(process.stdout.readline()))
        finally:
            process.stdin.close()
            process.wait(STOP_S)
