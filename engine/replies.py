"""Several replies to one prompt: each its own request to the engine, which shares the prompt's blocks among them.

Above every runtime, like `completion`. Reply i draws with seed + i; of `best_of` replies those with the best mean logprob
of a token are kept; the others were computed too, but nobody's usage counts them.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import replace
from math import fsum

import msgspec

from vivace.engine.completion import TextEvent, stream
from vivace.engine.concurrent import merge, within
from vivace.engine.events import EngineRequest, TokenLogprobs
from vivace.engine.runtimes import Engine
from vivace.engine.sampling import Replies, TextRules
from vivace.engine.tokenizer import Tokenizer


def stream_replies(
    engine: Engine,
    tokenizer: Tokenizer,
    request: EngineRequest,
    *,
    rules: TextRules,
    replies: Replies,
    places: asyncio.Semaphore,
) -> AsyncGenerator[TextEvent]:
    """Text events of all replies, in order within each `index`; each reply has one final event, a stop or length.

    Raises Cancelled or DeadlineExceeded for a request that was ended, and what the engine refuses it with.
    Closing this early aborts them all, and so does the first that fails. With `best_of` over `n`, nothing comes before
    all have ended. Each reply is in the engine only while it has one of `places`, which other calls may share.
    """
    drawn = [
        within(stream(engine, tokenizer, one, rules), places)
        for one in reply_requests(request, replies)
    ]
    return drawn[0] if len(drawn) == 1 else _several(drawn, request, replies)


async def _several(
    replies_drawn: Sequence[AsyncGenerator[TextEvent]], request: EngineRequest, replies: Replies
) -> AsyncGenerator[TextEvent]:
    drawn: list[list[TextEvent]] = [[] for _ in replies_drawn]
    sources = [_named(events, request.request_id, i) for i, events in enumerate(replies_drawn)]
    async with aclosing(merge(sources, max_parallel=len(sources))) as events:
        async for event in events:
            if replies.best_of == replies.n:
                yield event
            else:
                drawn[event.index].append(event)
    if replies.best_of > replies.n:
        for event in best_replies(
            drawn, replies.n, keeps_logprobs=request.sampling.logprobs is not None
        ):
            yield event


def part_id(request_id: str, index: int) -> str:
    """The engine's name for one of the requests that a caller's becomes. No caller's id has a `#`."""
    return request_id if index == 0 else f"{request_id}#{index}"


def reply_requests(request: EngineRequest, replies: Replies) -> list[EngineRequest]:
    """What the engine is asked for each reply that is drawn."""
    sampling = request.sampling
    if replies.best_of > replies.n and sampling.logprobs is None:
        sampling = replace(sampling, logprobs=0)  # to rank by
    return [
        replace(
            request,
            request_id=part_id(request.request_id, i),
            sampling=replace(
                sampling,
                seed=(sampling.seed + i) % 2**64,
                prompt_logprobs=sampling.prompt_logprobs if i == 0 else None,
            ),
        )
        for i in range(replies.best_of)
    ]


async def _named(
    drawn: AsyncGenerator[TextEvent], name: str, index: int
) -> AsyncGenerator[TextEvent]:
    async with aclosing(drawn) as events:
        async for event in events:
            yield msgspec.structs.replace(event, request_id=name, index=index)


def best_replies(
    drawn: Sequence[list[TextEvent]], n: int, *, keeps_logprobs: bool
) -> list[TextEvent]:
    """Each of the `n` best as one event, best first, ties to the one drawn first; all, as they were drawn, if there are no
    more. `prompt_logprobs` are the first one's."""
    whole = [_joined(events) for events in drawn]
    prompt_logprobs = whole[0].prompt_logprobs
    if n < len(whole):
        whole = sorted(whole, key=lambda event: -_mean_logprob(event.logprobs))[:n]
    return [
        msgspec.structs.replace(
            event,
            index=i,
            logprobs=event.logprobs if keeps_logprobs else (),
            prompt_logprobs=prompt_logprobs if i == 0 else (),
        )
        for i, event in enumerate(whole)
    ]


def _joined(events: Sequence[TextEvent]) -> TextEvent:
    return msgspec.structs.replace(
        events[-1],
        text="".join(event.text for event in events),
        token_ids=tuple(token for event in events for token in event.token_ids),
        logprobs=tuple(place for event in events for place in event.logprobs),
        prompt_logprobs=tuple(place for event in events for place in event.prompt_logprobs),
    )


def _mean_logprob(places: Sequence[TokenLogprobs]) -> float:
    return fsum(place.logprob for place in places) / len(places)
