"""Work that every engine is given alike: prompts of token ids, a number of tokens for each, greedy and without an end. And
what became of it, from when which tokens came.
"""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from vivace.engine.core import EngineCore
from vivace.engine.events import EngineRequest, Sampling

FIRST_ID = 100  # below are control tokens, in some vocabularies

Event = tuple[int, float, int]  # prompt, when, number of tokens


@dataclass(frozen=True, slots=True)
class Job:
    """Requests that come at once."""

    prompts: tuple[tuple[int, ...], ...]
    num_tokens: int  # of each


@dataclass(frozen=True, slots=True)
class Timing:
    """What a user sees of a job."""

    ttft_s: float  # median
    decode_rate: float  # tokens/s of all, after the last one's first token; 0: none came later
    wall_s: float


def random_job(seed: int, *, streams: int, prompt: int, shared: int = 0, tokens: int) -> Job:
    """Random prompts: `shared` tokens that all have, then `prompt` of their own. Ids are below 1,000."""
    draw = random.Random(f"{seed} {streams} {prompt} {shared}")  # no kind of job repeats another's
    common = _ids(draw, shared)
    return Job(tuple(common + _ids(draw, prompt) for _ in range(streams)), tokens)


def timing(start: float, events: Sequence[Event], job: Job) -> Timing:
    """Raises RuntimeError unless every prompt got its tokens."""
    first: dict[int, float] = {}
    counts = dict.fromkeys(range(len(job.prompts)), 0)
    for prompt, when, count in events:
        if count:
            first.setdefault(prompt, when)
            counts[prompt] += count
    if set(counts.values()) != {job.num_tokens}:
        raise RuntimeError(f"{job.num_tokens} tokens for each prompt, got {counts}")
    begun, end = max(first.values()), max(when for _, when, _ in events)
    later = sum(count for _, when, count in events if when > begun)
    return Timing(
        ttft_s=median(when - start for when in first.values()),
        decode_rate=later / (end - begun) if later else 0.0,
        wall_s=end - start,
    )


def run(engine: EngineCore, job: Job) -> tuple[float, list[Event]]:
    """When it began, and what came."""
    start = time.perf_counter()
    sampling = Sampling(0.0, 0, 1.0, 0.0, 0, job.num_tokens, 0, (), None, None)
    for i, prompt in enumerate(job.prompts):
        engine.add(EngineRequest(str(i), prompt, sampling), time.monotonic())
    events: list[Event] = []
    while engine.has_work:
        found = engine.step(time.monotonic())
        now = time.perf_counter()
        events += ((int(one.request_id), now, len(one.token_ids)) for one in found)
    return start, events


def _ids(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(FIRST_ID, 1000) for _ in range(count))
