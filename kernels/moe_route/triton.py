"""Routing in Triton. Bound by launch and latency: E numbers a token, K rounds of a maximum.

A row of experts lies in registers, group by group, each filled up to a power of two. What is looked for is the largest of
64-bit keys: rank above, below it the expert counted down, so that ties go to the lower one and no two are the same. Limits:
K rounds are unrolled; E in the thousands spills.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Config, Launcher

OUT = tl.constexpr(-0x7FFFFFFFFFFFFFFF)  # below every key
CONFIG = Config({"BLOCK_T": 4}, num_warps=4)
CANDIDATES = {
    "any": tuple(Config({"BLOCK_T": t}, num_warps=w) for t in (1, 2, 4, 8) for w in (1, 4))
}


@triton.jit
def _keys(ranks, index):
    """Ordered as (rank, lower index first); -0 is 0."""
    bits = tl.where(ranks == 0, 0.0, ranks).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) + (0x7FFFFFFF - index)


@triton.jit
def _index(keys):
    """What `_keys` was given, as int32."""
    return 0x7FFFFFFF - (keys & 0xFFFFFFFF).to(tl.int32)


@triton.jit
def _scores(wide, IS_SOFTMAX: tl.constexpr):
    """Of a row's fp64 logits; those of -inf beyond the row count for nothing."""
    if IS_SOFTMAX:
        parts = tl.exp(wide - tl.max(wide, 1)[:, None])
        return (parts / tl.sum(parts, 1)[:, None]).to(tl.float32)
    small = tl.exp(-tl.abs(wide))  # never overflows
    return (tl.where(wide >= 0, 1.0, small) / (1.0 + small)).to(tl.float32)


@triton.jit
def _renormalized(scores, wide, IS_SOFTMAX: tl.constexpr):
    """Of what is chosen: scores, or of softmax the fp64 logits."""
    if IS_SOFTMAX:
        return _scores(wide, IS_SOFTMAX)
    total = tl.sum(scores, 1)[:, None] + 1e-20
    return tl.div_rn(scores, tl.broadcast_to(total, scores.shape))


@triton.jit
def _is_in_best_groups(
    ranks,  # fp32 [R, GP * SP]
    keys,  # int64, likewise
    expert,  # int32 [1, GP * SP]
    G: tl.constexpr,
    GP: tl.constexpr,
    SP: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    NUM_COUNTED: tl.constexpr,
):
    """Whether each expert's group is among the best."""
    R: tl.constexpr = ranks.shape[0]
    grouped = tl.reshape(tl.where(keys == OUT, -float("inf"), ranks), (R, GP, SP))
    worth = tl.max(grouped, 2)
    if NUM_COUNTED > 1:
        best = _index(tl.max(tl.reshape(keys, (R, GP, SP)), 2))
        is_best = tl.reshape(tl.broadcast_to(expert, (R, GP * SP)), (R, GP, SP)) == best[:, :, None]
        worth += tl.max(tl.where(is_best, -float("inf"), grouped), 2)
    group = tl.arange(0, GP)[None, :]
    left = tl.where(group < G, _keys(worth, group), OUT)
    is_in = tl.zeros((R, GP), tl.int1)
    for _ in tl.static_range(TOP_GROUPS):
        is_taken = group == _index(tl.max(left, 1))[:, None]
        is_in = is_in | is_taken
        left = tl.where(is_taken, OUT, left)
    return tl.reshape(tl.broadcast_to(is_in[:, :, None], (R, GP, SP)), (R, GP * SP))


@triton.jit(do_not_specialize=["T"])
def _moe_route(
    weights_ptr,  # fp32 [T, K], out
    experts_ptr,  # int32 [T, K], out
    logits_ptr,  # fp32 [T, E]
    loads_ptr,  # int64 [E], added to
    bias_ptr,  # fp32 [E]
    T,
    scale,
    E: tl.constexpr,
    K: tl.constexpr,
    G: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    IS_SOFTMAX: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_LOADS: tl.constexpr,
    GP: tl.constexpr,  # powers of two, no less than the groups, their experts, and K
    SP: tl.constexpr,
    KP: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    at = tl.minimum(row, T - 1).to(tl.int64)[:, None]  # rows beyond the last repeat it
    lane = tl.arange(0, GP * SP)[None, :]
    expert = lane // SP * (E // G) + lane % SP
    is_expert = (lane // SP < G) & (lane % SP < E // G)
    expert = tl.where(is_expert, expert, -1)  # fillers are nobody's namesakes
    logits = tl.load(logits_ptr + at * E + expert, mask=is_expert, other=-float("inf"))
    wide = logits.to(tl.float64)
    scores = _scores(wide, IS_SOFTMAX)
    ranks = logits
    if HAS_BIAS:
        ranks = scores + tl.load(bias_ptr + expert, mask=is_expert, other=0)
    keys = tl.where(is_expert, _keys(ranks, expert), OUT)
    if TOP_GROUPS < G:
        counted: tl.constexpr = 2 if HAS_BIAS and E // G > 1 else 1
        is_in = _is_in_best_groups(ranks, keys, expert, G, GP, SP, TOP_GROUPS, counted)
        keys = tl.where(is_in, keys, OUT)

    k_lane = tl.arange(0, KP)[None, :]
    experts = tl.zeros((BLOCK_T, KP), tl.int32)
    weights = tl.zeros((BLOCK_T, KP), tl.float32)
    chosen = tl.full((BLOCK_T, KP), -float("inf"), tl.float64)
    for k in tl.static_range(K):
        best = _index(tl.max(keys, 1))[:, None]
        is_best = expert == best
        keys = tl.where(is_best, OUT, keys)
        experts = tl.where(k_lane == k, best, experts)
        if RENORMALIZE and IS_SOFTMAX:
            logit = tl.sum(tl.where(is_best, wide, 0.0), 1)[:, None]
            chosen = tl.where(k_lane == k, logit, chosen)
        else:
            score = tl.sum(tl.where(is_best, scores, 0.0), 1)[:, None]
            weights = tl.where(k_lane == k, score, weights)
    if RENORMALIZE:
        weights = _renormalized(weights, chosen, IS_SOFTMAX)
    is_slot = (row < T)[:, None] & (k_lane < K)
    slot = at * K + k_lane
    tl.store(weights_ptr + slot, weights * scale, mask=is_slot)
    tl.store(experts_ptr + slot, experts, mask=is_slot)
    if HAS_LOADS:
        tl.atomic_add(loads_ptr + experts, 1, mask=is_slot, sem="relaxed")


def bind(launcher: Launcher) -> Callable[..., None]:
    """The op on one device."""
    config = launcher.config("moe_route", "any", CONFIG)

    def run(
        weights_TK: torch.Tensor,
        experts_TK: torch.Tensor,
        logits_TE: torch.Tensor,
        loads_E: torch.Tensor | None = None,
        bias_E: torch.Tensor | None = None,
        *,
        scoring: str,
        renormalize: bool,
        scale: float = 1.0,
        num_groups: int = 1,
        top_groups: int = 1,
    ) -> None:
        (T, E), K = logits_TE.shape, weights_TK.shape[1]
        groups = num_groups if top_groups < num_groups else 1
        constexprs = {
            "E": E,
            "K": K,
            "G": groups,
            "TOP_GROUPS": min(top_groups, groups),
            "IS_SOFTMAX": scoring == "softmax",
            "RENORMALIZE": renormalize,
            "HAS_BIAS": bias_E is not None,
            "HAS_LOADS": loads_E is not None,
            "GP": triton.next_power_of_2(groups),
            "SP": triton.next_power_of_2(E // groups),
            "KP": triton.next_power_of_2(K),
        }
        args = (weights_TK, experts_TK, logits_TE, loads_E, bias_E, T, scale)
        launcher.launch(
            _moe_route, (triton.cdiv(T, config.tiles["BLOCK_T"]),), args, constexprs, config
        )

    return run
