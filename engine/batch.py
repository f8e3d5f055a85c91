"""Scheduled chunks to arrays: the only place where a request becomes a tensor.

Every running request has a row in tables that stay: its blocks, and how it samples. A step copies the rows it needs.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vivace.engine.adjustments import AdjustmentRows, Adjustments
from vivace.engine.request import Array, Request
from vivace.engine.scheduler import Chunk


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """How each row of logits is sampled; int32, fp32 and int64 arrays as `kernels.sample` wants them."""

    temperature_R: Array
    top_k_R: Array
    top_p_R: Array
    min_p_R: Array
    seeds_R: Array
    positions_R: Array
    adjustments: AdjustmentRows


@dataclass(frozen=True, slots=True)
class PromptRows:
    """Rows of logits, after those that sample, that belong to one request's prompt."""

    request: Request
    first_position: int  # of the token that the first row predicts
    count: int


@dataclass(frozen=True, slots=True)
class PooledRows:
    """Rows of the final hidden state that belong to one request's embedding, in the order of its tokens."""

    request: Request
    first_position: int  # of the token that the first row is of
    rows: Sequence[int]


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. The first `num_sampled` rows are of `sampled`, in order; then come the prompts' rows, then those of
    which no logits are wanted."""

    chunks: Sequence[Chunk]
    inputs: dict[str, Array]  # by the names of the program's inputs
    sampled: Sequence[Chunk]
    prompt_rows: Sequence[PromptRows]
    pooled_rows: Sequence[PooledRows]
    sampling: SamplingRows
    num_logprobs: int | None  # the most best tokens that a row wants; None: no row wants logprobs

    @property
    def num_sampled(self) -> int:
        """Rows that sample."""
        return len(self.sampled)

    @property
    def num_rows(self) -> int:
        """Rows of logits in all."""
        return len(self.sampling.temperature_R)


class Batcher:
    """Owns the tables. `max_blocks` is the most blocks that one request can hold.

    With `long_rope_from`, inputs say of each token whether its request has more tokens than that.
    """

    def __init__(
        self,
        max_running: int,
        max_blocks: int,
        block_tokens: int,
        *,
        vocab_size: int,
        long_rope_from: int | None = None,
    ) -> None:
        self._block_tokens = block_tokens
        self._long_rope_from = long_rope_from
        self._blocks = np.zeros((max_running, max_blocks), np.int32)
        self._temperature = np.zeros(max_running, np.float32)
        self._top_k = np.zeros(max_running, np.int32)
        self._top_p = np.ones(max_running, np.float32)
        self._min_p = np.zeros(max_running, np.float32)
        self._seed = np.zeros(max_running, np.int64)
        self._adjustments = Adjustments(max_running, vocab_size)

    def build(self, chunks: Sequence[Chunk]) -> Batch:
        """Arrays of one step, in the order of `chunks`."""
        tokens: list[int] = []
        for chunk in chunks:
            request = chunk.request
            if request.num_tabled < len(request.blocks):
                self._enter(request)
            if chunk.num_tokens == 1:
                tokens.append(request.tokens[request.num_computed])
            else:
                tokens += request.tokens[request.num_computed : chunk.end]
        slots_B = np.array([chunk.request.slot for chunk in chunks], np.intp)
        starts_B = np.array([chunk.request.num_computed for chunk in chunks], np.int32)
        counts_B = np.array([chunk.num_tokens for chunk in chunks], np.int32)
        query_starts = np.zeros(len(chunks) + 1, np.int32)
        np.cumsum(counts_B, out=query_starts[1:])
        positions_T = np.arange(len(tokens), dtype=np.int32)
        positions_T += np.repeat(starts_B - query_starts[:-1], counts_B)
        context_lens_B = starts_B + counts_B
        table = self._blocks[slots_B, : -(-int(context_lens_B.max()) // self._block_tokens)]
        block_T = table[
            np.repeat(np.arange(len(chunks)), counts_B), positions_T // self._block_tokens
        ]
        sampled, logit_rows, prompt_rows = _logit_rows(chunks, query_starts)
        rows, pooled_rows = logit_rows, list[PooledRows]()
        if len(sampled) < len(chunks):  # whoever samples has no embedding
            rows, pooled_rows = _pooled_rows(chunks, query_starts, logit_rows)
        inputs = {
            "tokens": np.array(tokens, np.int32),
            "positions": positions_T,
            "slots": block_T * self._block_tokens + positions_T % self._block_tokens,
            "block_tables": table,
            "query_starts": query_starts,
            "context_lens": context_lens_B,
            "rows": np.array(rows, np.int32),
        }
        if self._long_rope_from is not None:
            lengths_B = np.array([len(chunk.request.tokens) for chunk in chunks])
            is_long_B = (lengths_B > self._long_rope_from).astype(np.int32)
            inputs["rope_variants"] = np.repeat(is_long_B, counts_B)
        return Batch(
            chunks=chunks,
            inputs=inputs,
            sampled=sampled,
            prompt_rows=prompt_rows,
            pooled_rows=pooled_rows,
            sampling=self._sampling(sampled, len(logit_rows)),
            num_logprobs=_num_logprobs(sampled, prompt_rows),
        )

    def _enter(self, request: Request) -> None:
        """Write what the tables do not know yet: all of a request that has just started, else its new blocks."""
        known = request.num_tabled
        self._blocks[request.slot, known : len(request.blocks)] = request.blocks[known:]
        request.num_tabled = len(request.blocks)
        if known == 0:
            sampling = request.sampling
            self._temperature[request.slot] = sampling.temperature
            self._top_k[request.slot] = sampling.top_k
            self._top_p[request.slot] = sampling.top_p
            self._min_p[request.slot] = sampling.min_p
            self._seed[request.slot] = np.uint64(sampling.seed).astype(np.int64)
            self._adjustments.enter(request)

    def _sampling(self, sampled: Sequence[Chunk], num_rows: int) -> SamplingRows:
        slots = np.array([chunk.request.slot for chunk in sampled], np.intp)
        return SamplingRows(
            temperature_R=_padded(self._temperature[slots], num_rows, 0),
            top_k_R=_padded(self._top_k[slots], num_rows, 0),
            top_p_R=_padded(self._top_p[slots], num_rows, 1),
            min_p_R=_padded(self._min_p[slots], num_rows, 0),
            seeds_R=_padded(self._seed[slots], num_rows, 0),
            positions_R=_padded(np.array([c.end for c in sampled], np.int32), num_rows, 0),
            adjustments=self._adjustments.rows([chunk.request for chunk in sampled], num_rows),
        )


def _logit_rows(
    chunks: Sequence[Chunk], query_starts: Array
) -> tuple[list[Chunk], list[int], list[PromptRows]]:
    """Which rows need logits: the last of each chunk that samples, then those that predict wanted prompt tokens."""
    sampled: list[Chunk] = []
    rows: list[int] = []
    prompt_rows: list[PromptRows] = []
    of_prompts: list[int] = []
    for i, chunk in enumerate(chunks):
        if chunk.samples:
            sampled.append(chunk)
            rows.append(int(query_starts[i + 1]) - 1)
        request = chunk.request
        if request.wants_prompt_logprobs:
            # The row at position p predicts token p + 1; what is recorded already (before a preemption) is skipped.
            first = max(request.num_computed + 1, len(request.prompt_logprobs))
            last = min(chunk.end, request.num_prompt_tokens - 1)
            if last >= first:
                prompt_rows.append(PromptRows(request, first, last - first + 1))
                offset = int(query_starts[i]) - request.num_computed - 1
                of_prompts += range(offset + first, offset + last + 1)
    return sampled, rows + of_prompts, prompt_rows


def _pooled_rows(
    chunks: Sequence[Chunk], query_starts: Array, logit_rows: list[int]
) -> tuple[list[int], list[PooledRows]]:
    """The rows of logits, then those that are only pooled; and which of all these make up each embedding."""
    pooled_rows: list[PooledRows] = []
    places = {row: place for place, row in enumerate(logit_rows)}
    for i, chunk in enumerate(chunks):
        request = chunk.request
        first = max(request.num_computed, request.first_pooled)
        if request.pooling is not None and first < chunk.end:
            offset = int(query_starts[i]) - request.num_computed
            rows = range(offset + first, offset + chunk.end)
            places_of = [places.setdefault(row, len(places)) for row in rows]
            pooled_rows.append(PooledRows(request, first, places_of))
    return list(places), pooled_rows


def _num_logprobs(sampled: Sequence[Chunk], prompt_rows: Sequence[PromptRows]) -> int | None:
    wanted = [chunk.request.sampling.logprobs for chunk in sampled]
    wanted += [rows.request.sampling.prompt_logprobs for rows in prompt_rows]
    return max((count for count in wanted if count is not None), default=None)


def _padded(array: Array, num_rows: int, value: float) -> Array:
    """Rows of prompts follow those that sample; they are drawn greedily and the draw is thrown away."""
    if len(array) == num_rows:
        return array
    return np.concatenate((array, np.full(num_rows - len(array), value, array.dtype)))
