"""Finding the best tokens of a row of scores: keys that order them, and bisection among keys, for kernels of several ops.

A key holds a score and a token, so no two of a row are equal and ties need no care.
"""

import triton
import triton.language as tl

MINUS_INF = tl.constexpr(-float("inf"))
LOWEST = tl.constexpr(-(2**63))  # below every key


@triton.jit
def order_of(scores):
    """int64 that compare as fp32 does, 0 and -0 alike."""
    bits = tl.where(scores == 0, 0.0, scores).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def score_of(order):
    """The inverse of `order_of`."""
    bits = order.to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def key_of(scores, tokens, BITS: tl.constexpr):
    """int64 of which the larger is the better token, ties to the lower id; no two of a row are equal. V <= 2^BITS."""
    return (order_of(scores) << BITS) + ((1 << BITS) - 1 - tokens)


@triton.jit
def mass_of(scores, best):
    """What scores weigh beside the best of their row, fp64."""
    return tl.exp(scores.to(tl.float64) - best)


@triton.jit
def finite(best):
    """0 for the best of a row of which all is forbidden: it can be subtracted."""
    return tl.where(best == MINUS_INF, 0.0, best)


@triton.jit
def at_least(
    keys,
    weights,
    V,
    least,
    best,
    FEW: tl.constexpr,
    MASS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """How many keys are not under one, or their mass, in fp64. FEW: of keys and weights in registers; or of a row of scores."""
    if FEW:
        total = tl.where(keys >= least, weights, tl.zeros_like(weights))
    else:
        total = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, V, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            x = tl.load(keys + tokens, mask=tokens < V, other=MINUS_INF)
            is_in = (key_of(x, tokens, BITS) >= least) & (x > MINUS_INF)
            if tl.max(is_in.to(tl.int32)) > 0:
                total += tl.where(is_in, mass_of(x, best) if MASS else 1.0, 0.0)
    return tl.sum(total).to(tl.float64)


@triton.jit
def crossing(
    keys,
    weights,
    V,
    low,
    high,
    wanted,
    best,
    FEW: tl.constexpr,
    MASS: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
    SLACK: tl.constexpr,
):
    """The largest key of low..high, or one at most SLACK under it, at and above which there is as much as wanted."""
    while high - low > SLACK:
        middle = low + ((high - low + 1) >> 1)
        if at_least(keys, weights, V, middle, best, FEW, MASS, BITS, BLOCK) >= wanted:
            low = middle
        else:
            high = middle - 1
    return low
