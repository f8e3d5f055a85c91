"""What the engine's own process costs: decode tokens/s of `NativeEngine`, over its socket and without gRPC, against the
same core stepped in this process, as `LLM` has it.

Two processes. This one steps a core of its own, and in turn is the front-end, an asyncio loop on uvloop like the server's,
whose engine is the other. While one of the two decodes, the other sleeps. Both decode the same requests with as many
threads, greedily and without text; the rate counts from when all have begun to when the first has ended.
"""

import asyncio
import time
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path

import uvloop

from vivace.bench.result import Figure, figure
from vivace.engine import core
from vivace.engine.config import Config, CpuConfig, quantized_by
from vivace.engine.core import Clock, EngineCore
from vivace.engine.events import EngineRequest, Sampling, TokenEvent
from vivace.engine.runtimes import Engine
from vivace.engine.runtimes.native import NativeEngine

PROMPT_TOKENS = 16


class Meter:
    """Decoded tokens per second of requests that run together."""

    def __init__(self, num_requests: int, clock: Clock = time.perf_counter) -> None:
        self._clock = clock
        self._unbegun = num_requests
        self._seen: set[str] = set()
        self._num_tokens = 0
        self._start = self._end = 0.0

    def note(self, event: TokenEvent) -> None:
        """Count an event."""
        if self._end:
            return
        if self._unbegun:
            if event.finish is not None:
                raise RuntimeError("a stream has ended before all had begun: ask for more tokens")
            if event.request_id not in self._seen:
                self._seen.add(event.request_id)
                self._unbegun -= 1
                self._start = self._clock()
            return
        self._num_tokens += len(event.token_ids)
        if event.finish is not None:
            self._end = self._clock()

    @property
    def rate(self) -> float:
        """Once one has ended."""
        assert self._end
        return self._num_tokens / (self._end - self._start)


@dataclass(frozen=True, slots=True)
class Load:
    """What both decode, in each round."""

    rounds: int
    streams: int  # at a time
    tokens: int  # of each
    threads: int  # that compute, of both
    quantize: str = "none"


def measure(model: Path, load: Load) -> list[Figure]:
    """Tokens/s of both, and the ratio round by round. The first round warms up and is not counted."""
    config = Config(
        model=model, cpu=CpuConfig(threads=load.threads), weights=quantized_by(load.quantize)
    )
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        rates = runner.run(_measure(config, load))
    name = f"{load.streams} streams"
    return [
        figure(f"engine process, {name}, tokens/s", [ours for ours, _ in rates]),
        figure(f"in process, {name}, tokens/s", [plain for _, plain in rates]),
        figure(f"ratio, {name}", [ours / plain for ours, plain in rates]),
    ]


async def _measure(config: Config, load: Load) -> list[tuple[float, float]]:
    engine = await NativeEngine.start(config, _no_progress)
    try:
        inside = core.load(config, _no_progress)
        info = await engine.info()
        requests = [_request(i, load.tokens, info.vocab_size) for i in range(load.streams)]
        rounds = range(load.rounds + 1)
        rates = [(await _drive(engine, requests), _step(inside, requests)) for _ in rounds]
    finally:
        await engine.close()
    return rates[1:]


async def _drive(engine: Engine, requests: list[EngineRequest]) -> float:
    meter = Meter(len(requests))

    async def read(request: EngineRequest) -> None:
        async with aclosing(engine.generate(request)) as events:
            async for event in events:
                meter.note(event)

    await asyncio.gather(*map(read, requests))
    return meter.rate


def _step(inside: EngineCore, requests: list[EngineRequest]) -> float:
    meter = Meter(len(requests))
    for request in requests:
        inside.add(request, time.monotonic())
    while inside.has_work:
        for event in inside.step(time.monotonic()):
            meter.note(event)
    return meter.rate


def _request(index: int, num_tokens: int, vocab_size: int) -> EngineRequest:
    sampling = Sampling(0.0, 0, 1.0, 0.0, 0, num_tokens, 0, (), None, None)
    prompt = tuple((index + i) % vocab_size for i in range(PROMPT_TOKENS))
    return EngineRequest(str(index), prompt, sampling)


def _no_progress(_done: int, _total: int) -> None:
    """Loading is not what is measured."""
