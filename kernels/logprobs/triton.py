"""Log-softmax on a GPU, a row spread over programs of 1,024 tokens, each of which notes its K best; then one merges those of
a row. Two launches: bound by launches at R = 1, by 4 bytes a token beyond; K rounds of a maximum in both, so meant for a small
K, and fp64 exponentials as in sample. Sums have one order.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Config, Launcher
from vivace.kernels.gpu.row_search import LOWEST, MINUS_INF, finite, key_of, mass_of, score_of

CHUNK = 1024
LEAST_BITS, LEAST_CHUNKS = 18, 256  # so that most vocabularies share what is compiled

CHUNKS = Config()
ROWS = Config()


@triton.jit(do_not_specialize=["K"])
def _chunks(
    best_keys,  # int64 [R, C, K], best first
    bests,  # fp64 [R, C]
    masses,  # fp64 [R, C]: beside the chunk's best
    num_above,  # int32 [R, C]: with a larger logit than the chosen token's
    logits,  # fp32 [R, V]
    chosen,  # int32 [R]
    V,
    K,
    CHUNK: tl.constexpr,
    BITS: tl.constexpr,
):
    r, c, C = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    tokens = c * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(logits + r * V + tokens, mask=tokens < V, other=MINUS_INF)
    limit = tl.load(logits + r * V + tl.load(chosen + r))
    tl.store(num_above + r * C + c, tl.sum((x > limit).to(tl.int32)))
    best = tl.max(x).to(tl.float64)
    tl.store(bests + r * C + c, best)
    tl.store(masses + r * C + c, tl.sum(mass_of(x, finite(best))))
    keys = tl.where(tokens < V, key_of(x, tokens, BITS), LOWEST)
    for i in range(K):
        top = tl.max(keys)
        tl.store(best_keys + (r * C + c) * K + i, top)
        keys = tl.where(keys == top, LOWEST, keys)


@triton.jit(do_not_specialize=["K"])
def _merge(
    chosen_logprobs,  # fp32 [R]
    ranks,  # int32 [R]
    top_ids,  # int32 [R, K]
    top_logprobs,  # fp32 [R, K]
    best_keys,  # int64 [R, C, K]
    bests,  # fp64 [R, C]
    masses,  # fp64 [R, C]
    num_above,  # int32 [R, C]
    logits,  # fp32 [R, V]
    chosen,  # int32 [R]
    V,
    K,
    CHUNK: tl.constexpr,
    BITS: tl.constexpr,
    C_BLOCK: tl.constexpr,
):
    r, c, C = tl.program_id(0).to(tl.int64), tl.arange(0, C_BLOCK), tl.cdiv(V, CHUNK)
    best_C = tl.load(bests + r * C + c, mask=c < C, other=MINUS_INF)
    best = finite(tl.max(best_C))
    mass_C = tl.load(masses + r * C + c, mask=c < C, other=0.0)
    mass = tl.sum(mass_C * tl.exp(finite(best_C) - best))
    total = best + tl.log(tl.where(mass > 0, mass, 1.0))
    logit = tl.load(logits + r * V + tl.load(chosen + r)).to(tl.float64)
    tl.store(chosen_logprobs + r, (logit - total).to(tl.float32))
    above = tl.load(num_above + r * C + c, mask=c < C, other=0)
    tl.store(ranks + r, 1 + tl.sum(above))
    lists = best_keys + (r * C + c) * K
    place = tl.zeros_like(c)
    head = tl.load(lists, mask=(c < C) & (place < K), other=LOWEST)
    for i in range(K):
        top = tl.max(head)
        tl.store(top_ids + r * K + i, ((1 << BITS) - 1 - (top & ((1 << BITS) - 1))).to(tl.int32))
        logprob = score_of(top >> BITS).to(tl.float64) - total
        tl.store(top_logprobs + r * K + i, logprob.to(tl.float32))
        is_taken = head == top
        place += is_taken.to(tl.int32)
        head = tl.load(lists + place, mask=(c < C) & (place < K), other=LOWEST)


def bind(launcher: Launcher) -> Callable[..., None]:
    chunks = launcher.config("logprobs", "chunks", CHUNKS)
    rows = launcher.config("logprobs", "rows", ROWS)

    def run(
        chosen_R: torch.Tensor,
        ranks_R: torch.Tensor,
        top_ids_RK: torch.Tensor,
        top_logprobs_RK: torch.Tensor,
        logits_RV: torch.Tensor,
        tokens_R: torch.Tensor,
    ) -> None:
        """See `kernels.logprobs`."""
        (R, V), K = logits_RV.shape, top_ids_RK.shape[1]
        C, bits = triton.cdiv(V, CHUNK), max(LEAST_BITS, (V - 1).bit_length())
        best_keys = launcher.scratch("logprobs_best_keys", (R, C, K), torch.int64)
        bests = launcher.scratch("logprobs_bests", (R, C), torch.float64)
        masses = launcher.scratch("logprobs_masses", (R, C), torch.float64)
        num_above = launcher.scratch("logprobs_num_above", (R, C), torch.int32)
        notes = (best_keys, bests, masses, num_above, logits_RV, tokens_R, V, K)
        sizes = {"CHUNK": CHUNK, "BITS": bits}
        launcher.launch(_chunks, (R, C), notes, sizes, chunks)
        outs = (chosen_R, ranks_R, top_ids_RK, top_logprobs_RK)
        sizes |= {"C_BLOCK": max(LEAST_CHUNKS, triton.next_power_of_2(C))}
        launcher.launch(_merge, (R,), (*outs, *notes), sizes, rows)

    return run
