"""The host's share of a decode step: `Scheduler.step` + `Batcher.build` + `Scheduler.commit`, against the plain floor.

No model runs. The two are timed in turn, so that the machine's drift meets both alike, and by their CPU time: neither waits
for anything, and what other processes take of the machine is not theirs.
"""

import time
from collections.abc import Callable

from vivace.bench.host_floor import HostFloor
from vivace.bench.result import Figure, figure
from vivace.engine.batch import Batcher
from vivace.engine.blocks import BlockPool
from vivace.engine.config import SchedulerConfig
from vivace.engine.events import Sampling
from vivace.engine.prefix import PrefixIndex
from vivace.engine.request import Request
from vivace.engine.scheduler import Scheduler

BLOCK_TOKENS = 16
PROMPT_TOKENS = 64
VOCAB_SIZE = 32_000
WARM_UP = 32
ROUND_STEPS = 16  # one block a request: each round has its true share of what full blocks cost


class HostPath:
    """The real scheduler and batcher with `num_requests` that decode for ever, each with its blocks full at its own time."""

    def __init__(self, num_requests: int, num_steps: int) -> None:
        tokens = PROMPT_TOKENS + BLOCK_TOKENS + num_steps + 2
        blocks = -(-tokens // BLOCK_TOKENS)
        prefix = PrefixIndex(BLOCK_TOKENS, b"bench")
        config = SchedulerConfig(max_step_tokens=4096, max_running=num_requests)
        pool = BlockPool(blocks * num_requests + num_requests, prefix)
        self._scheduler = Scheduler(config, pool, prefix, block_tokens=BLOCK_TOKENS)
        self._batcher = Batcher(num_requests, blocks, BLOCK_TOKENS, vocab_size=VOCAB_SIZE)
        sampling = Sampling(0.7, 40, 0.9, 0.0, 1, num_steps + 2, 0, (2,), None, None)
        for i in range(num_requests):
            prompt = [i + 3] * (PROMPT_TOKENS + i % BLOCK_TOKENS)
            self._scheduler.add(Request(str(i), prompt, len(prompt), sampling, arrival=0.0))
        while self._scheduler.num_waiting:
            self.step()

    def step(self) -> None:
        """Schedule, build the arrays, record a token for each."""
        step = self._scheduler.step(0.0)
        batch = self._batcher.build(step)
        self._scheduler.commit(step, [7] * batch.num_sampled)


def measure(num_requests: int, rounds: int) -> list[Figure]:
    """Milliseconds a step of both, and the ratio round by round."""
    path = HostPath(num_requests, WARM_UP + rounds * ROUND_STEPS + 64)
    floor = HostFloor(num_requests)
    for _ in range(WARM_UP):
        path.step()
        floor.step()
    ours, floors = [], []
    for _ in range(rounds):
        ours.append(_time_ms(path.step))
        floors.append(_time_ms(floor.step))
    ratios = [a / b for a, b in zip(ours, floors, strict=True)]
    return [
        figure(f"host step, {num_requests} requests, ms", ours),
        figure(f"plain floor, {num_requests} requests, ms", floors),
        figure(f"ratio, {num_requests} requests", ratios),
    ]


def _time_ms(step: Callable[[], object]) -> float:
    start = time.thread_time()
    for _ in range(ROUND_STEPS):
        step()
    return (time.thread_time() - start) * 1e3 / ROUND_STEPS
