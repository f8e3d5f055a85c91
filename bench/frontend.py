"""What the service costs beside its engine: our front-end over an engine that answers at once, against a bare echo.

Three processes: this one is the load generator, the same for both, which keeps bytes and looks into them when the time has
been taken (`http2.py`); the two servers (`frontend_server.py`) are called in turn. The CPU of each says which one the rate
hangs on.
"""

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import IO

from vivace.bench import http2
from vivace.bench.frontend_server import HOST
from vivace.bench.result import Figure, figure
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb

COMMAND = (sys.executable, "-P", "-m", "vivace.bench.frontend_server")
SERVICE = f"/{pb.DESCRIPTOR.services_by_name['Inference'].full_name}"
PROMPT = "How many days does delivery take?"
STOP_S = 10
TIMEOUT_S = 60.0  # for anything to come


@dataclass(frozen=True, slots=True)
class Load:
    """How much is asked of both, in each round."""

    rounds: int
    streams: int  # at a time
    messages: int  # of each
    calls: int  # of one token, one after another; their median counts


@dataclass(frozen=True, slots=True)
class Streams:
    """One round of concurrent streams."""

    rate: float  # messages/s
    server_us: float  # of CPU, a message
    client_us: float


@dataclass(frozen=True, slots=True)
class Server:
    """A process that serves, and a connection to it."""

    orders: IO[str]
    answers: IO[str]
    connection: http2.Connection

    def cpu_s(self) -> float:
        """CPU time of all its threads so far."""
        print(file=self.orders, flush=True)
        return float(self.answers.readline())

    def streams(self, load: Load) -> Streams:
        """Calls of Generate at the same time, until the last has ended."""
        requests = [_request(load.messages)] * load.streams
        cpu, own, start = self.cpu_s(), time.process_time(), time.perf_counter()
        bodies = self.connection.call(f"{SERVICE}/Generate", requests)
        wall, own = time.perf_counter() - start, time.process_time() - own
        cpu = self.cpu_s() - cpu
        total = load.streams * load.messages
        for body in bodies:
            _check(http2.messages(body), load.messages)
        return Streams(total / wall, server_us=cpu * 1e6 / total, client_us=own * 1e6 / total)

    def median_ms(self, method: str, load: Load) -> float:
        """Of calls for one token, one after another."""
        times, bodies = [], []
        for _ in range(load.calls):
            start = time.perf_counter()
            bodies += self.connection.call(f"{SERVICE}/{method}", [_request(1)])
            times.append((time.perf_counter() - start) * 1e3)
        for body in bodies:
            _check(http2.messages(body), 1)
        return median(times)


def measure(model: Path, load: Load) -> list[Figure]:
    """Rates, latencies and CPU of both, and their ratios round by round. The first round warms up and is not counted."""
    with server("service", model) as service, server("echo", model) as echo:
        both, rounds = (service, echo), range(load.rounds + 1)
        streams = [[one.streams(load) for one in both] for _ in rounds][1:]
        unary = [[one.median_ms("GenerateUnary", load) for one in both] for _ in rounds][1:]
        short = [[one.median_ms("Generate", load) for one in both] for _ in rounds][1:]
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
        *_pair("Generate of one token, ms", short),
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


def _check(found: Sequence[bytes], count: int) -> None:
    """Raise RuntimeError for a call that failed or did not give each token a message of its own."""
    if len(found) != count:
        raise RuntimeError(f"a call for {count} tokens was answered with {len(found)} messages")


def _request(num_tokens: int) -> bytes:
    sampling = pb.SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    return pb.GenerateRequest(text=PROMPT, sampling=sampling).SerializeToString()


@contextmanager
def server(kind: str, model: Path) -> Iterator[Server]:
    """A process of `frontend_server.py`."""
    with subprocess.Popen(
        [*COMMAND, kind, str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            port = int(process.stdout.readline())
            with closing(http2.Connection(HOST, port, timeout_s=TIMEOUT_S)) as connection:
                yield Server(process.stdin, process.stdout, connection)
        finally:
            process.stdin.close()
            process.wait(STOP_S)
