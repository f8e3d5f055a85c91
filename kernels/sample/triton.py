"""Sampling on a GPU, a row spread over programs of 1,024 tokens each. Six launches, whatever the rows ask for:

adjust   (R, chunks)  penalties, bias, temperature; of a row without filters also the draw. 4 bytes a token read, 4 written.
bound    (R)          from the best of each group of 64 tokens, a score that no token to be kept lies under.
gather   (R, chunks)  the tokens not under it, in any order. 4 bytes a token read.
limit    (R)          the least key that top-k and top-p keep, by bisection of those tokens.
apply    (R, chunks)  drops the others and draws. 4 bytes a token read, 4 written.
choose   (R)          the best draw of the chunks.

A row without filters leaves bound, gather, limit and apply at once. Bound by launches at R = 1; beyond, by 20 bytes a token
and, for noise and masses in fp64, by flops: a GPU of few fp64 units is slower. Sums have one order, or, of what was gathered in
any, are of whole numbers, and bisection needs none, so a row does not depend on its batch. Where more than CAPACITY tokens come
into question (flat rows under top-p, a top-k beyond the number of groups) one program bisects the row itself, as exactly, in
about fifty passes over it. A list of penalties or biases is read by every chunk of its row.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Config, Launcher
from vivace.kernels.gpu.row_search import (
    LOWEST,
    MINUS_INF,
    at_least,
    crossing,
    finite,
    key_of,
    mass_of,
    order_of,
    score_of,
)
from vivace.kernels.logprobs.triton import LEAST_BITS, LEAST_CHUNKS

CHUNK = 1024
GROUPS = 16  # of a chunk
CAPACITY = 4096
UNITS = tl.constexpr(1 << 50)  # that the best token of a row weighs: CAPACITY of them fit int64
NEAR = tl.constexpr(1 << 12)  # of the places of a score among all fp32: a bound need not be exact
CHUNKS = Config()
ROWS = Config(num_warps=16)


@triton.jit
def _mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _gumbel(seed, position, tokens):
    """The contract's noise, uint64 and fp64."""
    stream = tl.zeros_like(tokens).to(tl.uint64) + seed.to(tl.uint64, bitcast=True)
    x = _mix(stream + position.to(tl.uint64) * 0x9E3779B97F4A7C15)
    x = _mix(x + tokens.to(tl.uint64) * 0xD1B54A32D192ED03)
    uniform = ((x >> 11).to(tl.float64) + 0.5) * 1.1102230246251565e-16  # 2^-53
    return -tl.log(-tl.log(uniform))


@triton.jit
def _draw(
    bests,  # fp64 [R, C]
    winners,  # int32 [R, C]
    scores,  # fp32 [CHUNK], -inf where there is no token
    tokens,  # int32 [CHUNK]
    seeds,
    positions,
    is_greedy,
    r,
    c,
    C,
):
    """Note down the best of a chunk."""
    drawn = scores.to(tl.float64)
    if not is_greedy:
        drawn += _gumbel(tl.load(seeds + r), tl.load(positions + r), tokens)
    drawn = tl.where(drawn == drawn, drawn, MINUS_INF)  # NaN is a broken model's
    best = tl.max(drawn)
    tl.store(bests + r * C + c, best)
    tl.store(winners + r * C + c, tl.min(tl.where(drawn == best, tokens, 0x7FFFFFFF)))


@triton.jit
def _is_filtered(temperature, top_k, top_p, min_p, r, V):
    k = tl.load(top_k + r)
    is_some = ((k > 0) & (k < V)) | (tl.load(top_p + r) < 1.0) | (tl.load(min_p + r) > 0.0)
    return is_some & (tl.load(temperature + r) > 0.0)


@triton.jit
def _penalize(
    out, logits, first, ids, counts, start, end, factor, per_count, once, CHUNK: tl.constexpr
):
    """The entries of a row's penalty list that fall into a chunk, from the logits into the scores."""
    for at in range(start, end, CHUNK):
        i = at + tl.arange(0, CHUNK)
        token = tl.load(ids + i, mask=i < end, other=-1)
        here = (token >= first) & (token < first + CHUNK)
        if tl.max(here.to(tl.int32)) > 0:
            score = tl.load(logits + token, mask=here, other=0.0)
            count = tl.load(counts + i, mask=here, other=0)
            score = tl.where(score > 0, tl.div_rn(score, factor), score * factor)
            # the product in fp64, so that no multiply-add keeps bits which fp32 has not
            score -= (per_count.to(tl.float64) * count.to(tl.float32)).to(tl.float32)
            score -= tl.where(count > 0, once, 0.0)
            tl.store(out + token, score, mask=here)


@triton.jit
def _add_biases(out, first, ids, values, start, end, FORBID: tl.constexpr, CHUNK: tl.constexpr):
    """Those of a chunk's tokens: the finite ones, or the -inf, of which a token may have several."""
    for at in range(start, end, CHUNK):
        i = at + tl.arange(0, CHUNK)
        token = tl.load(ids + i, mask=i < end, other=-1)
        here = (token >= first) & (token < first + CHUNK)
        if tl.max(here.to(tl.int32)) > 0:
            value = tl.load(values + i, mask=here, other=0.0)
            if FORBID:
                tl.store(out + token, value, mask=here & (value == MINUS_INF))
            else:
                here &= value != MINUS_INF
                score = tl.load(out + token, mask=here, other=0.0)
                tl.store(out + token, score + value, mask=here)


@triton.jit
def _adjust(
    scores,  # fp32 [R, V]
    bests,  # fp64 [R, C]: a chunk's best draw, or with filters its best score
    winners,  # int32 [R, C]
    masses,  # fp64 [R, C]: beside the chunk's best; for top-p
    group_bests,  # fp32 [R, C * GROUPS]
    logits,  # fp32 [R, V]
    temperature,  # fp32 [R]
    top_k,  # int32 [R]
    top_p,  # fp32 [R]
    min_p,  # fp32 [R]
    seeds,  # int64 [R]
    positions,  # int32 [R]
    repetition,  # fp32 [R]
    frequency,  # fp32 [R]
    presence,  # fp32 [R]
    penalty_starts,  # int32 [R + 1]
    penalty_ids,  # int32
    penalty_counts,  # int32
    bias_starts,  # int32 [R + 1]
    bias_ids,  # int32
    bias_values,  # fp32
    V,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
):
    r, c, C = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    first = c * CHUNK
    tokens = first + tl.arange(0, CHUNK)
    row, out = logits + r * V, scores + r * V
    x = tl.load(row + tokens, mask=tokens < V, other=MINUS_INF)
    p0, p1 = tl.load(penalty_starts + r), tl.load(penalty_starts + r + 1)
    b0, b1 = tl.load(bias_starts + r), tl.load(bias_starts + r + 1)
    if (p1 > p0) | (b1 > b0):  # through memory: an entry's place is data
        tl.store(out + tokens, x, mask=tokens < V)
        tl.debug_barrier()
        factor, per_count = tl.load(repetition + r), tl.load(frequency + r)
        once = tl.load(presence + r)
        _penalize(
            out, row, first, penalty_ids, penalty_counts, p0, p1, factor, per_count, once, CHUNK
        )
        tl.debug_barrier()
        _add_biases(out, first, bias_ids, bias_values, b0, b1, False, CHUNK)
        tl.debug_barrier()
        _add_biases(out, first, bias_ids, bias_values, b0, b1, True, CHUNK)
        tl.debug_barrier()
        x = tl.load(out + tokens, mask=tokens < V, other=MINUS_INF)
    heat = tl.load(temperature + r)
    x = tl.div_rn(x, tl.where(heat > 0, heat, 1.0))
    tl.store(out + tokens, x, mask=tokens < V)
    if _is_filtered(temperature, top_k, top_p, min_p, r, V):
        of_groups = tl.max(tl.reshape(x, (GROUPS, CHUNK // GROUPS)), axis=1)
        tl.store(group_bests + (r * C + c) * GROUPS + tl.arange(0, GROUPS), of_groups)
        best = tl.max(of_groups).to(tl.float64)
        tl.store(bests + r * C + c, best)
        if tl.load(top_p + r) < 1.0:
            tl.store(masses + r * C + c, tl.sum(mass_of(x, finite(best))))
    else:
        _draw(bests, winners, x, tokens, seeds, positions, heat == 0, r, c, C)


@triton.jit
def _bound(
    bounds,  # fp32 [R]: below it nothing is kept
    row_bests,  # fp64 [R]
    row_masses,  # fp64 [R]; for top-p
    num_found,  # int32 [R]: 0
    bests,  # fp64 [R, C]
    masses,  # fp64 [R, C]
    group_bests,  # fp32 [R, C * GROUPS]
    temperature,  # fp32 [R]
    top_k,  # int32 [R]
    top_p,  # fp32 [R]
    min_p,  # fp32 [R]
    V,
    CHUNK: tl.constexpr,
    GROUPS: tl.constexpr,
    C_BLOCK: tl.constexpr,
    GROUP_BLOCK: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    if not _is_filtered(temperature, top_k, top_p, min_p, r, V):
        return
    c, i, C = tl.arange(0, C_BLOCK), tl.arange(0, GROUP_BLOCK), tl.cdiv(V, CHUNK)
    best_C = tl.load(bests + r * C + c, mask=c < C, other=MINUS_INF)
    best = finite(tl.max(best_C))
    heads = tl.load(group_bests + r * C * GROUPS + i, mask=i < C * GROUPS, other=MINUS_INF)
    orders, ones = order_of(heads), tl.where(heads > MINUS_INF, 1.0, 0.0).to(tl.float64)
    k, p, least = tl.load(top_k + r), tl.load(top_p + r), tl.load(min_p + r)
    lowest, top = order_of(best.to(tl.float32) * 0.0 + MINUS_INF), order_of(best.to(tl.float32))
    low = lowest
    if (k > 0) & (k < V):  # k groups have a token as good
        low = crossing(orders, ones, V, low, top, k, best, True, False, 0, C_BLOCK, NEAR)
    elif least > 0.0:  # a little less, for what fp32 rounds
        share = best + tl.log(least.to(tl.float64))
        low = order_of((share - 1e-6 * tl.abs(share) - 1e-9).to(tl.float32))
    if p < 1.0:
        mass_C = tl.load(masses + r * C + c, mask=c < C, other=0.0)
        mass = tl.sum(mass_C * tl.exp(finite(best_C) - best))
        tl.store(row_masses + r, mass)
        if (k == 0) | (k >= V):  # the best of the groups alone weigh enough
            wanted = p.to(tl.float64) * mass * (1 + 1e-12)
            weights = mass_of(heads, best)
            heavy = crossing(
                orders, weights, V, lowest, top, wanted, best, True, True, 0, C_BLOCK, NEAR
            )
            low = tl.maximum(low, heavy)
    tl.store(bounds + r, score_of(low))
    tl.store(row_bests + r, best)
    tl.store(num_found + r, 0)


@triton.jit
def _gather(
    found,  # int64 [R, CAPACITY]: keys, in any order
    num_found,  # int32 [R]: all there are, fit or not
    scores,  # fp32 [R, V]
    bounds,  # fp32 [R]
    temperature,  # fp32 [R]
    top_k,  # int32 [R]
    top_p,  # fp32 [R]
    min_p,  # fp32 [R]
    V,
    CHUNK: tl.constexpr,
    CAPACITY: tl.constexpr,
    BITS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    if not _is_filtered(temperature, top_k, top_p, min_p, r, V):
        return
    tokens = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(scores + r * V + tokens, mask=tokens < V, other=MINUS_INF)
    is_found = (x >= tl.load(bounds + r)) & (x > MINUS_INF)
    count = tl.sum(is_found.to(tl.int32))
    if count > 0:
        place = tl.atomic_add(num_found + r, count, sem="relaxed")
        place += tl.cumsum(is_found.to(tl.int32)) - 1
        is_found &= place < CAPACITY
        tl.store(found + r * CAPACITY + place, key_of(x, tokens, BITS), mask=is_found)


@triton.jit
def _least_kept(
    keys,
    ones,
    masses,
    V,
    k,
    p,
    mass,
    bound,
    best,
    FEW: tl.constexpr,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The key of the last token that top-k and top-p keep. `mass` is that of the row, counted as `masses` are."""
    low = order_of(bound) << BITS
    high = (order_of(best.to(tl.float32)) << BITS) + (1 << BITS) - 1
    if (k > 0) & (k < V):
        low = crossing(keys, ones, V, low, high, k, best, FEW, False, BITS, BLOCK, 0)
        if p < 1.0:
            mass = at_least(keys, masses, V, low, best, FEW, True, BITS, BLOCK)
    if p < 1.0:
        wanted = p.to(tl.float64) * mass
        low = crossing(keys, masses, V, low, high, wanted, best, FEW, True, BITS, BLOCK, 0)
    return low


@triton.jit
def _limit(
    limits,  # int64 [R]: the least key that is kept
    found,  # int64 [R, CAPACITY]
    num_found,  # int32 [R]
    bounds,  # fp32 [R]
    row_bests,  # fp64 [R]
    row_masses,  # fp64 [R]
    scores,  # fp32 [R, V]
    temperature,  # fp32 [R]
    top_k,  # int32 [R]
    top_p,  # fp32 [R]
    min_p,  # fp32 [R]
    V,
    CAPACITY: tl.constexpr,
    BITS: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64)
    if not _is_filtered(temperature, top_k, top_p, min_p, r, V):
        return
    k, p, count = tl.load(top_k + r), tl.load(top_p + r), tl.load(num_found + r)
    best, bound = tl.load(row_bests + r), tl.load(bounds + r)
    mass = best  # any fp64
    if p < 1.0:
        mass = tl.load(row_masses + r)
    if count > CAPACITY:
        row = scores + r * V
        limit = _least_kept(row, 0, 0, V, k, p, mass, bound, best, False, BITS, CAPACITY)
    else:
        i = tl.arange(0, CAPACITY)
        keys = tl.load(found + r * CAPACITY + i, mask=i < count, other=LOWEST)
        ones = (i < count).to(tl.int64)
        masses = mass_of(score_of(keys >> BITS), best) * UNITS + 0.5
        masses = tl.where(i < count, masses, 0.0).to(tl.int64)
        mass *= UNITS
        limit = _least_kept(keys, ones, masses, V, k, p, mass, bound, best, True, BITS, CAPACITY)
    tl.store(limits + r, limit)


@triton.jit
def _apply(
    scores,  # fp32 [R, V]
    bests,  # fp64 [R, C]
    winners,  # int32 [R, C]
    limits,  # int64 [R]
    row_bests,  # fp64 [R]
    temperature,  # fp32 [R]
    top_k,  # int32 [R]
    top_p,  # fp32 [R]
    min_p,  # fp32 [R]
    seeds,  # int64 [R]
    positions,  # int32 [R]
    V,
    CHUNK: tl.constexpr,
    BITS: tl.constexpr,
):
    r, c, C = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    if not _is_filtered(temperature, top_k, top_p, min_p, r, V):
        return
    tokens = c * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(scores + r * V + tokens, mask=tokens < V, other=MINUS_INF)
    is_kept = (key_of(x, tokens, BITS) >= tl.load(limits + r)) & (x > MINUS_INF)
    least = tl.load(min_p + r)
    if least > 0.0:
        is_kept &= mass_of(x, tl.load(row_bests + r)) >= least.to(tl.float64)
    x = tl.where(is_kept, x, MINUS_INF)
    tl.store(scores + r * V + tokens, x, mask=tokens < V)
    if tl.max(is_kept.to(tl.int32)) > 0:
        _draw(bests, winners, x, tokens, seeds, positions, False, r, c, C)
    else:
        tl.store(bests + r * C + c, MINUS_INF)
        tl.store(winners + r * C + c, c * CHUNK)


@triton.jit
def _choose(
    tokens,  # int32 [R]
    bests,  # fp64 [R, C]
    winners,  # int32 [R, C]
    V,
    CHUNK: tl.constexpr,
    C_BLOCK: tl.constexpr,
):
    r, c, C = tl.program_id(0).to(tl.int64), tl.arange(0, C_BLOCK), tl.cdiv(V, CHUNK)
    drawn = tl.load(bests + r * C + c, mask=c < C, other=MINUS_INF)
    token = tl.load(winners + r * C + c, mask=c < C, other=0x7FFFFFFF)
    tl.store(tokens + r, tl.min(tl.where(drawn == tl.max(drawn), token, 0x7FFFFFFF)))


def bind(launcher: Launcher) -> Callable[..., None]:
    chunks = launcher.config("sample", "chunks", CHUNKS)
    rows = launcher.config("sample", "rows", ROWS)

    def scratch(name: str, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return launcher.scratch(f"sample_{name}", shape, dtype)

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
        R, V = logits_RV.shape
        C, bits = triton.cdiv(V, CHUNK), max(LEAST_BITS, (V - 1).bit_length())
        capacity = min(CAPACITY, triton.next_power_of_2(V))
        bests, masses = (scratch(name, torch.float64, R, C) for name in ("bests", "masses"))
        winners = scratch("winners", torch.int32, R, C)
        group_bests = scratch("group_bests", torch.float32, R, C * GROUPS)
        bounds = scratch("bounds", torch.float32, R)
        names = "row_bests", "row_masses"
        row_bests, row_masses = (scratch(name, torch.float64, R) for name in names)
        num_found, limits = scratch("num_found", torch.int32, R), scratch("limits", torch.int64, R)
        found = scratch("found", torch.int64, R, capacity)
        filters, noise = (temperature_R, top_k_R, top_p_R, min_p_R), (seeds_R, positions_R)
        sizes = {"CHUNK": CHUNK, "GROUPS": GROUPS, "CAPACITY": capacity, "BITS": bits}
        block = max(LEAST_CHUNKS, triton.next_power_of_2(C))
        sizes |= {"C_BLOCK": block, "GROUP_BLOCK": block * GROUPS}

        def launch(kernel: object, args: tuple[object, ...], names: str, *, is_row: bool) -> None:
            constexprs = {name: sizes[name] for name in names.split()}
            grid = (R,) if is_row else (R, C)
            launcher.launch(kernel, grid, args, constexprs, rows if is_row else chunks)

        args: tuple[object, ...] = (scores_RV, bests, winners, masses, group_bests, logits_RV)
        args = (*args, *filters, *noise, repetition_R, frequency_R, presence_R)
        args = (*args, penalty_starts, penalty_ids, penalty_counts)
        args = (*args, bias_starts, bias_ids, bias_values, V)
        launch(_adjust, args, "CHUNK GROUPS", is_row=False)
        args = (bounds, row_bests, row_masses, num_found, bests, masses, group_bests, *filters, V)
        launch(_bound, args, "CHUNK GROUPS C_BLOCK GROUP_BLOCK", is_row=True)
        args = (found, num_found, scores_RV, bounds, *filters, V)
        launch(_gather, args, "CHUNK CAPACITY BITS", is_row=False)
        args = (limits, found, num_found, bounds, row_bests, row_masses, scores_RV, *filters, V)
        launch(_limit, args, "CAPACITY BITS", is_row=True)
        args = (scores_RV, bests, winners, limits, row_bests, *filters, *noise, V)
        launch(_apply, args, "CHUNK BITS", is_row=False)
        launch(_choose, (tokens_R, bests, winners, V), "CHUNK C_BLOCK", is_row=True)

    return run
