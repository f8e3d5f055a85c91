"""Logits to token ids, and the logprobs that were asked for. The one place that waits for the device."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from vivace.engine.batch import Batch
from vivace.engine.events import TokenLogprobs
from vivace.engine.sampling import MAX_LOGPROBS
from vivace.kernels.backend import Ops
from vivace.kernels.buffer import Buffer, DType

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class RowLogprobs:
    """Log-softmax of raw logits on the host: of each row's token, its rank, and the K best."""

    tokens_R: Array
    chosen_R: Array
    ranks_R: Array
    top_ids_RK: Array
    top_logprobs_RK: Array

    def row(self, row: int, count: int) -> TokenLogprobs:
        """One row, with its `count` best."""
        ids, logprobs = self.top_ids_RK[row, :count], self.top_logprobs_RK[row, :count]
        return TokenLogprobs(
            token_id=int(self.tokens_R[row]),
            logprob=float(self.chosen_R[row]),
            rank=int(self.ranks_R[row]),
            top=tuple(zip(ids.tolist(), logprobs.tolist(), strict=True)),
        )


class Sampler:
    """Owns the buffers of the two ops, made once for the most rows a step can have."""

    def __init__(self, ops: Ops, max_rows: int, vocab_size: int) -> None:
        self._ops = ops
        self._vocab_size = vocab_size
        memory = ops.memory
        self._scores = memory.empty((max_rows * vocab_size,), DType.FP32)
        self._tokens = memory.empty((max_rows,), DType.INT32)
        self._ranks = memory.empty((max_rows,), DType.INT32)
        self._chosen = memory.empty((max_rows,), DType.FP32)
        most = min(MAX_LOGPROBS, vocab_size)
        self._top_ids = memory.empty((max_rows * most,), DType.INT32)
        self._top_logprobs = memory.empty((max_rows * most,), DType.FP32)

    def sample(self, logits_RV: Buffer, batch: Batch) -> None:
        """Draw the token of each row that samples; `sampled` reads them."""
        R, memory, rows = batch.num_sampled, self._ops.memory, batch.sampling
        adjustments = rows.adjustments
        self._ops.sample(
            memory.view(self._tokens, (R,)),
            memory.view(self._scores, (R, self._vocab_size)),
            memory.view(logits_RV, (R, self._vocab_size)),
            memory.upload(rows.temperature_R),
            memory.upload(rows.top_k_R),
            memory.upload(rows.top_p_R),
            memory.upload(rows.min_p_R),
            memory.upload(rows.seeds_R),
            memory.upload(rows.positions_R),
            memory.upload(adjustments.repetition_R),
            memory.upload(adjustments.frequency_R),
            memory.upload(adjustments.presence_R),
            memory.upload(adjustments.penalty_starts),
            memory.upload(adjustments.penalty_ids),
            memory.upload(adjustments.penalty_counts),
            memory.upload(adjustments.bias_starts),
            memory.upload(adjustments.bias_ids),
            memory.upload(adjustments.bias_values),
        )

    def sampled(self, batch: Batch) -> list[int]:
        """The tokens that were drawn, of each row that samples."""
        memory = self._ops.memory
        tokens: list[int] = memory.read(memory.view(self._tokens, (batch.num_sampled,))).tolist()
        return tokens

    def logprobs(self, logits_RV: Buffer, batch: Batch, sampled: list[int]) -> RowLogprobs | None:
        """Of `batch.logprob_rows`: the sampled token, or the prompt's own. None if no row wants any."""
        rows, K, memory = batch.logprob_rows, batch.num_logprobs, self._ops.memory
        R = len(rows)
        if R == 0:
            return None
        tokens = list(sampled)
        for of_prompt in batch.prompt_rows:
            first = of_prompt.first_position
            tokens += of_prompt.request.tokens[first : first + of_prompt.count]
        tokens_R = np.array(tokens, np.int32)[rows]
        if batch.num_rows > R:  # the scores of what was drawn are needed no more
            wanted_RV = memory.view(self._scores, (R, self._vocab_size))
            self._ops.take_rows(wanted_RV, logits_RV, memory.upload(rows))
            logits_RV = wanted_RV
        chosen_R, ranks_R = memory.view(self._chosen, (R,)), memory.view(self._ranks, (R,))
        top_ids_RK = memory.view(self._top_ids, (R, K))
        top_logprobs_RK = memory.view(self._top_logprobs, (R, K))
        self._ops.logprobs(
            chosen_R, ranks_R, top_ids_RK, top_logprobs_RK, logits_RV, memory.upload(tokens_R)
        )
        return RowLogprobs(
            tokens_R,
            memory.read(chosen_R),
            memory.read(ranks_R),
            memory.read(top_ids_RK),
            memory.read(top_logprobs_RK),
        )
