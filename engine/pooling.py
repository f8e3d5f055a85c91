"""Hidden states of a prompt's tokens to its embedding.

Sums in fp64, row by row in the order of the tokens: however a prompt is cut into chunks, the bits are the same. Does not
normalise.
"""

from collections.abc import Sequence

import numpy as np

from vivace.engine.batch import PooledRows
from vivace.engine.request import Array, Request


def add_rows(pooled_rows: Sequence[PooledRows], hidden_PM: Array) -> None:
    """Add a step's final hidden states to the sums of their requests."""
    for pooled in pooled_rows:
        request = pooled.request
        if pooled.first_position == request.first_pooled:  # after a preemption: anew
            request.hidden_sum_M = np.zeros(hidden_PM.shape[1])
        assert request.hidden_sum_M is not None
        for row in pooled.rows:  # not `np.sum`, which chooses its own order
            request.hidden_sum_M += hidden_PM[row]


def embedding(request: Request) -> tuple[float, ...] | None:
    """The mean of the rows added, in fp32. None if the request asks for none."""
    if request.hidden_sum_M is None:
        return None
    count = request.num_prompt_tokens - request.first_pooled
    return tuple((request.hidden_sum_M / count).astype(np.float32).tolist())
