"""What requests do to their logits before they are sampled: penalties, biases, tokens that are forbidden.

Decides nothing about which tokens exist: `sampling.resolve` has checked every id. Knows requests and NumPy, no tensors.
What a request never asked for costs it nothing, and what it asked for is kept by its slot: a static bias made once, and the
tokens of prompt and reply, counted on as the reply grows. All of it follows from the request's own tokens, so that starting
again after a preemption, in another slot, gives the same rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import is_not
from typing import Any

import numpy as np

from vivace.engine.events import Sampling
from vivace.engine.request import Request

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class AdjustmentRows:
    """Penalties and biases of each row of logits, as `kernels.sample` wants them. Never written to once made."""

    repetition_R: Array
    frequency_R: Array
    presence_R: Array
    penalty_starts: Array
    penalty_ids: Array
    penalty_counts: Array
    bias_starts: Array
    bias_ids: Array
    bias_values: Array


@dataclass(frozen=True, slots=True)
class _Bias:
    """Added to the logits of some tokens."""

    ids: Array
    values: Array


class _Counts:
    """The tokens that a request's penalties look at, each once, and how often the reply has it."""

    def __init__(self, request: Request, vocab_size: int) -> None:
        # Only the repetition penalty looks at the prompt.
        skipped = 0 if request.sampling.repetition_penalty != 1 else request.num_prompt_tokens
        known = np.unique(np.array(request.tokens[skipped:], np.int32))
        room = min(vocab_size, len(known) + request.sampling.max_tokens - request.num_generated)
        self._ids = np.empty(room, np.int32)
        self._counts = np.zeros(room, np.int32)
        self._ids[: len(known)] = known
        self._places = dict(zip(known.tolist(), range(len(known)), strict=True))
        self._num_counted = request.num_prompt_tokens

    def rows(self, request: Request) -> tuple[Array, Array]:
        """Ids and counts, what the reply has gained since the last call included."""
        while self._num_counted < len(request.tokens):
            token = request.tokens[self._num_counted]
            place = self._places.setdefault(token, len(self._places))
            self._ids[place] = token
            self._counts[place] += 1
            self._num_counted += 1
        size = len(self._places)
        return self._ids[:size], self._counts[:size]


class _Adjustment:
    """One running request that asks for something."""

    def __init__(self, request: Request, vocab_size: int) -> None:
        sampling = request.sampling
        self._bias = _static_bias(sampling, vocab_size)
        self._min_tokens = sampling.min_tokens
        self._early = self._bias  # until that many tokens are there
        if sampling.min_tokens:
            self._early = _concatenated(self._bias, _forbidden(sampling.stop_token_ids))
        self._counts = _Counts(request, vocab_size) if _penalizes(sampling) else None

    def bias(self, request: Request) -> _Bias:
        """What its next token's logits are biased by."""
        return self._early if request.num_generated < self._min_tokens else self._bias

    def penalties(self, request: Request) -> tuple[Array, Array]:
        """Ids and counts of what its next token is penalized for."""
        return (_NO_IDS, _NO_IDS) if self._counts is None else self._counts.rows(request)


class Adjustments:
    """Owns the state of the running requests, by slot."""

    def __init__(self, max_running: int, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._slots: list[_Adjustment | None] = [None] * max_running
        self._num_adjusting = 0  # slots whose last request asked for something; it may be gone
        self._ones = np.ones(max_running, np.float32)
        self._zeros = np.zeros(max_running, np.float32)
        self._no_starts = np.zeros(max_running + 1, np.int32)
        self._biases: list[_Bias] = []  # of the rows of the last step that had any
        self._joined = _NO_BIAS

    def enter(self, request: Request) -> None:
        """Take note of a request that starts to run, be it again, in its slot."""
        asks = _adjusts(request.sampling)
        self._num_adjusting += asks - (self._slots[request.slot] is not None)
        self._slots[request.slot] = _Adjustment(request, self._vocab_size) if asks else None

    def rows(self, requests: Sequence[Request]) -> AdjustmentRows:
        """Of the rows that sample, in the order of `requests`."""
        num_rows = len(requests)
        found = [self._slots[request.slot] for request in requests] if self._num_adjusting else []
        if not any(found):
            self._biases, self._joined = [], _NO_BIAS  # some megabytes, perhaps
            return self._nothing(num_rows)
        neutral = self._nothing(num_rows)
        repetition_R, frequency_R = neutral.repetition_R.copy(), neutral.frequency_R.copy()
        presence_R = neutral.presence_R.copy()
        num_penalties = np.zeros(num_rows, np.int32)
        penalties, biases = [(_NO_IDS, _NO_IDS)], [_NO_BIAS] * num_rows
        for row, (request, adjustment) in enumerate(zip(requests, found, strict=True)):
            if adjustment is not None:
                repetition_R[row] = request.sampling.repetition_penalty
                frequency_R[row] = request.sampling.frequency_penalty
                presence_R[row] = request.sampling.presence_penalty
                penalties.append(adjustment.penalties(request))
                num_penalties[row] = len(penalties[-1][0])
                biases[row] = adjustment.bias(request)
        bias = self._join(biases)
        return AdjustmentRows(
            repetition_R=repetition_R,
            frequency_R=frequency_R,
            presence_R=presence_R,
            penalty_starts=_starts(num_penalties),
            penalty_ids=np.concatenate([ids for ids, _ in penalties]),
            penalty_counts=np.concatenate([counts for _, counts in penalties]),
            bias_starts=_starts(np.array([len(one.ids) for one in biases], np.int32)),
            bias_ids=bias.ids,
            bias_values=bias.values,
        )

    def _join(self, biases: list[_Bias]) -> _Bias:
        """Those of all rows, made anew where one has changed: a few allowed tokens are a bias of all others, and the same
        requests decode for many steps."""
        if len(biases) != len(self._biases) or any(map(is_not, biases, self._biases)):
            self._biases = biases
            self._joined = _Bias(
                np.concatenate([one.ids for one in biases]),
                np.concatenate([one.values for one in biases]),
            )
        return self._joined

    def _nothing(self, num_rows: int) -> AdjustmentRows:
        zeros, starts = self._zeros[:num_rows], self._no_starts[: num_rows + 1]
        return AdjustmentRows(
            repetition_R=self._ones[:num_rows],
            frequency_R=zeros,
            presence_R=zeros,
            penalty_starts=starts,
            penalty_ids=_NO_IDS,
            penalty_counts=_NO_IDS,
            bias_starts=starts,
            bias_ids=_NO_IDS,
            bias_values=_NO_BIAS.values,
        )


_NO_IDS = np.zeros(0, np.int32)
_NO_BIAS = _Bias(_NO_IDS, np.zeros(0, np.float32))


def _adjusts(sampling: Sampling) -> bool:
    return bool(
        _penalizes(sampling)
        or (sampling.min_tokens and sampling.stop_token_ids)
        or sampling.logit_bias
        or sampling.allowed_token_ids
        or sampling.bad_token_ids
    )


def _penalizes(sampling: Sampling) -> bool:
    return bool(
        sampling.repetition_penalty != 1 or sampling.frequency_penalty or sampling.presence_penalty
    )


def _static_bias(sampling: Sampling, vocab_size: int) -> _Bias:
    ids, values = zip(*sampling.logit_bias, strict=True) if sampling.logit_bias else ((), ())
    bias = _concatenated(
        _Bias(np.array(ids, np.int32), np.array(values, np.float32)),
        _forbidden(sampling.bad_token_ids),
    )
    if not sampling.allowed_token_ids:
        return bias
    is_other = np.ones(vocab_size, bool)
    is_other[list(sampling.allowed_token_ids)] = False
    return _concatenated(bias, _forbidden(np.flatnonzero(is_other)))


def _forbidden(token_ids: Sequence[int] | Array) -> _Bias:
    return _Bias(np.array(token_ids, np.int32), np.full(len(token_ids), -np.inf, np.float32))


def _concatenated(first: _Bias, second: _Bias) -> _Bias:
    return _Bias(
        np.concatenate((first.ids, second.ids)), np.concatenate((first.values, second.values))
    )


def _starts(counts: Array) -> Array:
    starts = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    return starts
