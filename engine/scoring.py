"""What a model thinks of texts that are given: embeddings of prompts, logprobs of continuations. Draws nothing.

Above every runtime, like `completion`. Each text is a request of its own to the engine, a few at a time; texts that begin
alike share blocks.
"""

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from math import fsum, sqrt

from vivace.engine.completion import raise_if_ended
from vivace.engine.concurrent import run_all
from vivace.engine.events import (
    EngineRequest,
    Pooling,
    Sampling,
    TokenEvent,
    TokenLogprobs,
    Usage,
)
from vivace.engine.replies import part_id
from vivace.engine.runtimes import Engine

PROMPT_ONLY = Sampling(
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    seed=0,
    max_tokens=0,
    min_tokens=0,
    stop_token_ids=(),
    logprobs=None,
    prompt_logprobs=None,
)


@dataclass(frozen=True, slots=True)
class Embedding:
    """Of one prompt."""

    values: tuple[float, ...]  # fp32
    usage: Usage


@dataclass(frozen=True, slots=True)
class Score:
    """Of one continuation."""

    places: tuple[TokenLogprobs, ...]  # one a token

    @property
    def sum_logprob(self) -> float:
        """Of the whole continuation."""
        return fsum(place.logprob for place in self.places)

    @property
    def mean_logprob(self) -> float:
        """Of a token of it."""
        return self.sum_logprob / len(self.places)


@dataclass(frozen=True, slots=True)
class Call:
    """What all requests of one call have in common."""

    request_id: str
    deadline: float | None = None
    salt: bytes = b""
    priority: int = 0
    max_parallel: int = 64  # requests in the engine at a time

    def request(self, index: int, token_ids: Sequence[int], sampling: Sampling) -> EngineRequest:
        """Its request number `index`."""
        return EngineRequest(
            part_id(self.request_id, index),
            tuple(token_ids),
            sampling,
            self.deadline,
            self.salt,
            self.priority,
        )


async def embed(
    engine: Engine,
    call: Call,
    prompts: Sequence[Sequence[int]],
    *,
    pooling: Pooling,
    normalize: bool,
) -> list[Embedding]:
    """The pooled final hidden state of each prompt; to length 1, if asked for."""

    async def one(index: int, token_ids: Sequence[int]) -> Embedding:
        request = replace(call.request(index, token_ids, PROMPT_ONLY), pooling=pooling)
        event = await _last(engine, request)
        assert event.embedding is not None and event.usage is not None
        return Embedding(_unit(event.embedding) if normalize else event.embedding, event.usage)

    tasks = [one(i, token_ids) for i, token_ids in enumerate(prompts)]
    return await run_all(tasks, max_parallel=call.max_parallel)


async def score(
    engine: Engine,
    call: Call,
    prompt: Sequence[int],
    continuations: Sequence[Sequence[int]],
    *,
    num_logprobs: int,
    prompt_logprobs: int | None,
) -> tuple[list[Score], tuple[TokenLogprobs | None, ...]]:
    """The score of each continuation, with so many best tokens a place, and likewise the prompt's own where asked for."""
    num_prompt = len(prompt)
    most = max(num_logprobs, prompt_logprobs or 0)

    async def one(index: int, token_ids: Sequence[int]) -> TokenEvent:
        # The first request computes the prompt, so it is the one that can tell of it.
        start = 1 if index == 0 and prompt_logprobs is not None else num_prompt
        sampling = replace(PROMPT_ONLY, prompt_logprobs=most, prompt_logprobs_start=start)
        return await _last(engine, call.request(index, (*prompt, *token_ids), sampling))

    tasks = [one(i, token_ids) for i, token_ids in enumerate(continuations)]
    ends = await run_all(tasks, max_parallel=call.max_parallel)
    of_prompt = ends[0].prompt_logprobs[:num_prompt] if prompt_logprobs is not None else ()
    return (
        [Score(_cut(end.prompt_logprobs[num_prompt:], num_logprobs)) for end in ends],
        tuple(
            None if place is None else _short(place, prompt_logprobs or 0) for place in of_prompt
        ),
    )


async def _last(engine: Engine, request: EngineRequest) -> TokenEvent:
    """The one event of a request that draws nothing."""
    async with aclosing(engine.generate(request)) as events:
        event = await anext(events)
    raise_if_ended(event.finish)
    return event


def _cut(places: Sequence[TokenLogprobs | None], count: int) -> tuple[TokenLogprobs, ...]:
    return tuple(_short(place, count) for place in places if place is not None)


def _short(place: TokenLogprobs, count: int) -> TokenLogprobs:
    return replace(place, top=place.top[:count])


def _unit(values: Sequence[float]) -> tuple[float, ...]:
    """To length 1; a vector of zeros stays one."""
    length = sqrt(fsum(value * value for value in values))
    return tuple(value / length for value in values) if length else tuple(values)
