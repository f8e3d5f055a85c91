"""What sampling means, on any device. Never optimise this file."""

import torch

MINUS_INF = -float("inf")


def run(
    tokens_R: torch.Tensor,
    scores_RV: torch.Tensor,
    logits_RV: torch.Tensor,
    temperature_R: torch.Tensor,
    top_k_R: torch.Tensor,
    top_p_R: torch.Tensor,
    min_p_R: torch.Tensor,
    seeds_R: torch.Tensor,
    positions_R: torch.Tensor,
    repetition_R: torch.Tensor,
    frequency_R: torch.Tensor,
    presence_R: torch.Tensor,
    penalty_starts: torch.Tensor,
    penalty_ids: torch.Tensor,
    penalty_counts: torch.Tensor,
    bias_starts: torch.Tensor,
    bias_ids: torch.Tensor,
    bias_values: torch.Tensor,
) -> None:
    """See `kernels.sample`."""
    V = logits_RV.shape[1]
    scores_RV.copy_(logits_RV)
    rows, ids = _rows(penalty_starts), penalty_ids.long()
    scores, repetition = scores_RV[rows, ids], repetition_R[rows]
    scores = torch.where(scores > 0, scores / repetition, scores * repetition)
    scores = scores - frequency_R[rows] * penalty_counts.float()
    scores_RV[rows, ids] = scores - torch.where(penalty_counts > 0, presence_R[rows], 0.0)
    at = (_rows(bias_starts), bias_ids.long())
    scores_RV.index_put_(at, bias_values, accumulate=True)
    greedy_R = temperature_R == 0
    tempered = scores_RV / temperature_R.where(~greedy_R, 1.0)[:, None]
    best, order = tempered.sort(dim=1, descending=True, stable=True)  # stable: ties to the lower id
    place = torch.arange(V, device=best.device)
    best = best.masked_fill((top_k_R > 0)[:, None] & (place >= top_k_R[:, None]), MINUS_INF)
    probability = best.double().softmax(1)
    before = probability.cumsum(1) - probability
    top_p = top_p_R.double()[:, None]
    best = best.masked_fill((top_p < 1) & (place > 0) & (before >= top_p), MINUS_INF)
    few = probability < min_p_R.double()[:, None] * probability[:, :1]
    best = best.masked_fill(few & (place > 0), MINUS_INF)
    filtered = torch.empty_like(best).scatter_(1, order, best)
    scores_RV.copy_(torch.where(greedy_R[:, None], scores_RV, filtered))
    noise = torch.where(greedy_R[:, None], 0.0, _gumbel(seeds_R, positions_R.long(), V))
    drawn = scores_RV.double() + noise
    is_best = drawn == drawn.max(1, keepdim=True).values
    tokens_R.copy_(
        place.where(is_best, V).min(1).values
    )  # argmax does not say which of equals it takes


def _rows(starts: torch.Tensor) -> torch.Tensor:
    """The row of each entry of a list."""
    counts = (starts[1:] - starts[:-1]).long()
    return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)


def _gumbel(seeds_R: torch.Tensor, positions_R: torch.Tensor, V: int) -> torch.Tensor:
    tokens = torch.arange(V, device=seeds_R.device)
    x = _mix(seeds_R + positions_R * _signed(0x9E3779B97F4A7C15))[:, None]
    x = _mix(x + tokens * _signed(0xD1B54A32D192ED03))
    uniform = (_shift(x, 11).double() + 0.5) * 2.0**-53
    return -(-uniform.log()).log()


def _mix(z: torch.Tensor) -> torch.Tensor:
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: torch.Tensor, bits: int) -> torch.Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts the sign in


def _signed(constant: int) -> int:
    return constant - (1 << 64)  # the same bits; torch has no unsigned multiplication
