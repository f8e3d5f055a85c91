"""Scheduled chunks to arrays: the only place where a request becomes a tensor.

Every running request has a row in tables that stay: its blocks, and how it samples. A step copies the rows it needs; how
those who decode sample is copied once, and used for as long as they are the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from vivace.engine.adjustments import AdjustmentRows, Adjustments
from vivace.engine.request import Array, Request
from vivace.engine.scheduler import Step

Choices = tuple[Array, Array, Array, Array, Array]  # `SamplingRows` up to its seeds


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
class _Decoding:
    """What is known of some requests for as long as they decode together: each computes one token a step."""

    requests: tuple[Request, ...]
    slots_B: Array
    starts_B: Array  # computed tokens, when they came together
    choices: Choices
    logprob_rows: Array
    num_logprobs: int

    def starts(self) -> Array:
        """Computed tokens now."""
        if not self.requests:
            return self.starts_B
        starts_B: Array = self.starts_B + (self.requests[0].num_computed - self.starts_B[0])
        return starts_B


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of the final hidden state that are wanted: of each that samples the last, then those that predict wanted prompt
    tokens, then those that are only pooled."""

    sampled: Sequence[Request]
    rows: Array
    num_logits: int
    prompt_rows: Sequence[PromptRows] = ()
    pooled_rows: Sequence[PooledRows] = ()


@dataclass(frozen=True, slots=True)
class Batch:
    """One step. The first `num_sampled` rows are of `sampled`, in order; then come the prompts' rows, then those of
    which no logits are wanted."""

    step: Step
    inputs: dict[str, Array]  # by the names of the program's inputs
    sampled: Sequence[Request]
    prompt_rows: Sequence[PromptRows]
    pooled_rows: Sequence[PooledRows]
    num_rows: int  # of logits in all
    sampling: SamplingRows
    logprob_rows: Array  # which want logprobs: some that sample, and all of the prompts'
    num_logprobs: int  # the most best tokens that one of these wants

    @property
    def num_sampled(self) -> int:
        """Rows that sample."""
        return len(self.sampled)


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
        self._counting = np.arange(max_running + 1, dtype=np.int32)
        self._decoding = self._keep(())

    def build(self, step: Step) -> Batch:
        """Arrays of one step: of those who decode, then of the chunks, in order."""
        decoding, chunks = step.decoding, step.chunks
        requests = (*decoding, *(chunk.request for chunk in chunks)) if chunks else decoding
        for request in requests:
            if request.num_tabled < len(request.blocks):
                self._enter(request)
        if self._decoding.requests is not decoding:
            self._decoding = self._keep(decoding)
        tokens = [request.tokens[-1] for request in decoding]
        slots_B, starts_B = self._decoding.slots_B, self._decoding.starts()
        query_starts = self._counting[: len(requests) + 1]  # as it is where each has one token
        owners_T, positions_T, context_lens_B = query_starts[:-1], starts_B, starts_B + 1
        if chunks:
            for chunk in chunks:
                tokens += chunk.request.tokens[chunk.request.num_computed : chunk.end]
            slots_B = np.array([request.slot for request in requests], np.intp)
            starts_B = np.array([request.num_computed for request in requests], np.int32)
            counts = [1] * len(decoding) + [chunk.num_tokens for chunk in chunks]
            counts_B = np.array(counts, np.int32)
            query_starts = np.zeros(len(requests) + 1, np.int32)
            np.cumsum(counts_B, out=query_starts[1:])
            owners_T = np.repeat(self._counting[: len(requests)], counts_B)
            positions_T = np.arange(len(tokens), dtype=np.int32)
            positions_T += (starts_B - query_starts[:-1])[owners_T]
            context_lens_B = starts_B + counts_B
        table = self._blocks[slots_B, : -(-int(context_lens_B.max()) // self._block_tokens)]
        block_T = table[owners_T, positions_T // self._block_tokens]
        rows = _rows(step, query_starts)
        logprob_rows, num_logprobs = self._logprobs(rows)
        inputs = {
            "tokens": np.array(tokens, np.int32),
            "positions": positions_T,
            "slots": block_T * self._block_tokens + positions_T % self._block_tokens,
            "block_tables": table,
            "query_starts": query_starts,
            "context_lens": context_lens_B,
            "rows": rows.rows,
        }
        if self._long_rope_from is not None:
            lengths_B = np.array([len(request.tokens) for request in requests])
            inputs["rope_variants"] = (lengths_B > self._long_rope_from).astype(np.int32)[owners_T]
        return Batch(
            step=step,
            inputs=inputs,
            sampled=rows.sampled,
            prompt_rows=rows.prompt_rows,
            pooled_rows=rows.pooled_rows,
            num_rows=rows.num_logits,
            sampling=self._sampling(rows.sampled, context_lens_B),
            logprob_rows=logprob_rows,
            num_logprobs=num_logprobs,
        )

    def _keep(self, decoding: tuple[Request, ...]) -> _Decoding:
        slots_B = np.array([request.slot for request in decoding], np.intp)
        logprob_rows, num_logprobs = _logprobs_of(decoding)
        return _Decoding(
            requests=decoding,
            slots_B=slots_B,
            starts_B=np.array([request.num_computed for request in decoding], np.int32),
            choices=self._choices(slots_B),
            logprob_rows=logprob_rows,
            num_logprobs=num_logprobs,
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

    def _sampling(self, sampled: Sequence[Request], context_lens_B: Array) -> SamplingRows:
        if sampled is self._decoding.requests:
            choices, positions_R = self._decoding.choices, context_lens_B
        else:
            choices = self._choices([request.slot for request in sampled])
            positions_R = np.array([len(request.tokens) for request in sampled], np.int32)
        adjustments = self._adjustments.rows(sampled)
        return SamplingRows(*choices, positions_R=positions_R, adjustments=adjustments)

    def _choices(self, slots: Sequence[int] | Array) -> Choices:
        slots = np.asarray(slots, np.intp)
        return (
            self._temperature[slots],
            self._top_k[slots],
            self._top_p[slots],
            self._min_p[slots],
            self._seed[slots],
        )

    def _logprobs(self, rows: _Rows) -> tuple[Array, int]:
        if rows.sampled is self._decoding.requests and not rows.prompt_rows:
            return self._decoding.logprob_rows, self._decoding.num_logprobs
        of_sampled, most = _logprobs_of(rows.sampled)
        of_prompts = np.arange(len(rows.sampled), rows.num_logits, dtype=np.int32)
        wanted = (one.request.sampling.prompt_logprobs or 0 for one in rows.prompt_rows)
        return np.concatenate((of_sampled, of_prompts)), max(most, *wanted, 0)


def _rows(step: Step, query_starts: Array) -> _Rows:
    """Which rows are wanted of a step."""
    num_decoding = len(step.decoding)
    if not step.chunks:
        return _Rows(step.decoding, query_starts[:-1], num_decoding)
    sampled = list(step.decoding)
    rows = list(range(num_decoding))
    prompt_rows: list[PromptRows] = []
    of_prompts: list[int] = []
    for i, chunk in enumerate(step.chunks, num_decoding):
        request = chunk.request
        if chunk.samples:
            sampled.append(request)
            rows.append(int(query_starts[i + 1]) - 1)
        if request.wants_prompt_logprobs:
            # The row at position p predicts token p + 1; what is recorded already (before a preemption) is skipped.
            first = max(request.num_computed + 1, len(request.prompt_logprobs))
            last = min(chunk.end, request.num_prompt_tokens - 1)
            if last >= first:
                prompt_rows.append(PromptRows(request, first, last - first + 1))
                offset = int(query_starts[i]) - request.num_computed - 1
                of_prompts += range(offset + first, offset + last + 1)
    rows += of_prompts
    all_rows, pooled_rows = _pooled_rows(step, query_starts, rows)
    return _Rows(sampled, np.array(all_rows, np.int32), len(rows), prompt_rows, pooled_rows)


def _pooled_rows(
    step: Step, query_starts: Array, logit_rows: list[int]
) -> tuple[list[int], list[PooledRows]]:
    """The rows of logits, then those that are only pooled; and which of all these make up each embedding."""
    if all(chunk.request.pooling is None for chunk in step.chunks):
        return logit_rows, []
    pooled_rows: list[PooledRows] = []
    places = {row: place for place, row in enumerate(logit_rows)}
    for i, chunk in enumerate(step.chunks, len(step.decoding)):
        request = chunk.request
        first = max(request.num_computed, request.first_pooled)
        if request.pooling is not None and first < chunk.end:
            offset = int(query_starts[i]) - request.num_computed
            rows = range(offset + first, offset + chunk.end)
            places_of = [places.setdefault(row, len(places)) for row in rows]
            pooled_rows.append(PooledRows(request, first, places_of))
    return list(places), pooled_rows


def _logprobs_of(sampled: Sequence[Request]) -> tuple[Array, int]:
    """Which of these want logprobs of what they draw, and the most best tokens that one of them wants."""
    counts = [one.sampling.logprobs for one in sampled]
    rows = [row for row, count in enumerate(counts) if count is not None]
    return np.array(rows, np.int32), max((count or 0 for count in counts), default=0)
