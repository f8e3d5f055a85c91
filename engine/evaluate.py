"""How well a model that is loaded predicts given tokens: its perplexity. Nothing is drawn, and every token but the first of a
row counts the same."""

import time
from collections.abc import Sequence
from dataclasses import replace
from math import exp, fsum

from vivace.engine.core import EngineCore
from vivace.engine.events import EngineRequest
from vivace.engine.scoring import PROMPT_ONLY

SCORED = replace(PROMPT_ONLY, prompt_logprobs=0)


def perplexity(core: EngineCore, rows: Sequence[Sequence[int]]) -> float:
    """e to the mean negative logprob over all tokens of all rows that have one before them.

    Raises InvalidRequest for a row that is longer than the context, ValueError if no token counts.
    """
    logprobs: list[float] = []
    for i, row in enumerate(rows):
        core.add(EngineRequest(str(i), tuple(row), SCORED), time.monotonic())
        while core.has_work:
            for event in core.step(time.monotonic()):
                places = (place for place in event.prompt_logprobs if place is not None)
                logprobs += (place.logprob for place in places)
    if not logprobs:
        raise ValueError(f"no token of {len(rows)} rows has one before it")
    return exp(-fsum(logprobs) / len(logprobs))
