"""Device time: calls captured in a CUDA graph that is replayed, their inputs rotated through more than the L2 cache.

First everything runs once; then the backend is sealed, so that a compilation or allocation in what is timed is an error.
Without a GPU each call runs as often as it must to be exercised and every time is 1 us: see `results.without_times`.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Call = Callable[[], object]
L2_TURNS = 4  # what is rotated through is this many times the L2
GRAPH_US = 4000.0  # a replay lasts about as long: it starts once, which takes 10 us
MAX_LAUNCHES = 1024  # of a graph
REPLAYS = 20
ESTIMATES = 3  # replays of one round, to know how many rounds a graph should have
WARM_UP_S = 0.1  # an idle GPU clocks down


@dataclass(frozen=True)
class Timing:
    """Of one call, in microseconds; the spread is between replays."""

    us: float
    p5_us: float
    p95_us: float


def copies(bytes_per_call: int, l2_bytes: int) -> int:
    """Sets of inputs that together are several times the L2."""
    return max(2, math.ceil(L2_TURNS * l2_bytes / max(1, bytes_per_call)))


@dataclass(frozen=True)
class Meter:
    """Times calls on one device."""

    device: str
    seal: Callable[[], None]  # nothing may be compiled from here on

    def times(self, groups: Mapping[str, Sequence[Call]]) -> dict[str, Timing]:
        """By name of a group: its calls take turns."""
        for calls in groups.values():
            for call in calls:
                call()
        self.seal()
        return {name: self._time(calls) for name, calls in groups.items()}

    def _time(self, calls: Sequence[Call]) -> Timing:
        if not self.device.startswith("cuda"):
            for call in calls:
                call()
            return Timing(1.0, 1.0, 1.0)
        once_us = min(self._replay(self._capture(calls, 1), ESTIMATES, 0.0))
        rounds = max(1, min(round(GRAPH_US / once_us), MAX_LAUNCHES // len(calls)))
        samples = self._replay(self._capture(calls, rounds), REPLAYS, WARM_UP_S)
        p5, us, p95 = np.percentile(np.array(samples) / (rounds * len(calls)), (5, 50, 95)).tolist()
        return Timing(us, p5, p95)

    def _capture(self, calls: Sequence[Call], rounds: int) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()  # the capture is on a stream that does not wait for the inputs
        with torch.cuda.graph(graph):
            for _ in range(rounds):
                for call in calls:
                    call()
        return graph

    def _replay(self, graph: torch.cuda.CUDAGraph, count: int, warm_up_s: float) -> list[float]:
        """Microseconds of each replay, by events around it: the host is ahead of the device."""
        until = time.perf_counter() + warm_up_s
        while time.perf_counter() < until:
            graph.replay()
            torch.cuda.synchronize()
        pairs = [_events() for _ in range(count)]
        for start, end in pairs:
            start.record()
            graph.replay()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in pairs]


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


class Replay:
    """A call that is captured once and then replayed; what it reads and writes stays where it is. On a CPU it is called."""

    def __init__(self, call: Call, device: str) -> None:
        self._call = call
        self._graph: torch.cuda.CUDAGraph | None = None
        call()  # compiles what it must
        if device.startswith("cuda"):
            self._graph = torch.cuda.CUDAGraph()
            torch.cuda.synchronize()
            with torch.cuda.graph(self._graph):
                call()

    def __call__(self) -> None:
        """Run once."""
        if self._graph is None:
            self._call()
        else:
            self._graph.replay()
            torch.cuda.synchronize()
