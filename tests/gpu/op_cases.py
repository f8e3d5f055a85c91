"""Random inputs for every op, and the comparison of two backends on them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vivace.kernels import moe_assign
from vivace.kernels.backend import Backend, Ops, load
from vivace.kernels.buffer import DType
from vivace.kernels.gated import ACTIVATIONS
from vivace.kernels.moe_route import SCORINGS

Array = np.ndarray[Any, Any]
Attrs = dict[str, Any]
Outs = tuple[tuple[tuple[int, ...], DType], ...]
FP32, INT32 = DType.FP32, DType.INT32
MATRICES = {  # which input of an op may be bf16
    "linear": 1,
    "expert_linear": 2,
    "expert_gated": 4,
    "expert_down": 4,
    "embed": 1,
}


@dataclass(frozen=True)
class Cache:
    """Stands for a KV cache among a case's buffers: each backend makes its own, and it is filled by
    a write."""

    num_blocks: int
    block_tokens: int
    k_TGD: Array
    v_TGD: Array
    slots_T: Array
    dtype: DType = FP32


@dataclass(frozen=True)
class OpCase:
    """One call of an op: outs by shape and type, then inputs, then attributes."""

    name: str
    op: str
    outs: Outs
    ins: tuple[Array | Cache | None, ...]
    attrs: Attrs
    tolerance: float = 1e-5


def compare(case: OpCase, first: Ops, second: Ops) -> float:
    """The largest difference of any output of two backends, as a fraction of its largest number."""
    return worst(outputs(case, first), outputs(case, second))


def worst(first: Sequence[Array], second: Sequence[Array]) -> float:
    """Likewise of outputs that are there; infinite where one side alone is not finite."""
    largest = 0.0
    for got, want in zip(first, second, strict=True):
        a, b = got.astype(np.float64), want.astype(np.float64)
        if not np.array_equal(np.isfinite(a), np.isfinite(b)):
            return float("inf")
        a, b = a[np.isfinite(a)], b[np.isfinite(b)]
        if a.size:
            largest = max(largest, float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)))
    return largest


def outputs(case: OpCase, ops: Ops) -> list[Array]:
    """What a backend makes of it, on the host."""
    memory = ops.memory
    outs = [memory.empty(shape, dtype) for shape, dtype in case.outs]
    ins = [_input(ops, x) for x in case.ins]
    if case.op == "rope_kv_write":
        cache, *rest = ins
        ops.rope_kv_write(outs[0], cache, *rest, **case.attrs)
        written = next(x for x in case.ins if isinstance(x, Cache))
        T, G, D = written.k_TGD.shape
        k, v = memory.empty((T, G, D), FP32), memory.empty((T, G, D), FP32)
        ops.kv_read(k, v, cache, memory.upload(written.slots_T))
        return [np.array(memory.read(x)) for x in (outs[0], k, v)]
    getattr(ops, case.op)(*outs, *ins, **case.attrs)
    found = [_host(memory.read(out)) for out in outs]
    if case.op == "block_topk":  # what lies behind a list is not written
        selected, counts = found
        places = np.arange(selected[0, 0].size).reshape(selected.shape[2:])
        found[0] = np.where(places < counts[:, :, None, None], selected, 0)
    return found


def _host(array: Array) -> Array:
    """A copy; of bf16, which is there as its bits, in fp32."""
    if array.dtype != np.uint16:
        return np.array(array)
    return (array.astype(np.uint32) << 16).view(np.float32)


def in_bf16(case: OpCase) -> OpCase | None:
    """The same with its matrix or its cache in bf16; None if it has neither."""
    ins = list(case.ins)
    for i, x in enumerate(ins):
        if isinstance(x, Cache):
            ins[i] = replace(x, dtype=DType.BF16)
        elif isinstance(x, np.ndarray) and MATRICES.get(case.op) == i:
            ins[i] = _rounded(x)
    if all(x is y for x, y in zip(ins, case.ins, strict=True)):
        return None
    return replace(case, name=f"{case.name}, bf16", ins=tuple(ins), tolerance=1e-2)


def _rounded(x: Array) -> Array:
    """The bits of the nearest bf16, ties to even, as uint16."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _input(ops: Ops, x: Array | Cache | None) -> Any:
    if x is None:
        return None
    return _filled(ops, x) if isinstance(x, Cache) else ops.memory.upload(x)


def _filled(ops: Ops, cache: Cache) -> Any:
    """A cache that holds k and v as they are: written with a rotation by no angle."""
    T, G, D = cache.k_TGD.shape
    memory = ops.memory
    buffer = memory.kv_cache(cache.num_blocks, cache.block_tokens, G, D, cache.dtype)
    rows = np.concatenate((cache.k_TGD, cache.k_TGD, cache.v_TGD), axis=1).reshape(T, 3 * G * D)
    cos_sin = np.concatenate((np.ones((T, D // 2)), np.zeros((T, D // 2))), axis=1)
    ops.rope_kv_write(
        memory.empty((T, G, D), FP32),
        buffer,
        memory.upload(np.ascontiguousarray(rows, np.float32)),
        memory.upload(np.ascontiguousarray(cos_sin, np.float32)),
        memory.upload(cache.slots_T),
        num_kv_heads=G,
        eps=1e-6,
    )
    return buffer


def op_cases() -> Iterator[OpCase]:
    """Every op that a model or the sampler calls, at sizes that are awkward or usual."""
    rng = np.random.default_rng(5)
    for T, N, K in ((1, 768, 256), (7, 33, 65), (64, 640, 256), (512, 256, 512)):
        outs, ins = (((T, N), FP32),), (_normal(rng, T, K), _normal(rng, N, K))
        yield OpCase(f"linear {T}x{N}x{K}", "linear", outs, ins, {})
        yield OpCase(f"linear+bias {T}x{N}x{K}", "linear", outs, (*ins, _normal(rng, N)), {})
        small = (ins[0], (_normal(rng, N, K).view(np.uint32) >> 16).astype(np.uint16))
        # where the product is one of bf16, x is rounded: 2^-9 of each, and they add up at random
        yield OpCase(f"linear bf16 {T}x{N}x{K}", "linear", outs, small, {}, 5e-3)
    for T, M in ((1, 256), (7, 33), (129, 512)):
        yield from _row_cases(rng, T, M)
    yield from _rope_cases(rng)
    for H, G, D in ((4, 4, 16), (8, 2, 64), (8, 1, 80), (2, 2, 128), (4, 1, 256)):
        yield from _attention_cases(rng, H, G, D)
        yield from _attention_cases(rng, H, G, D, S=64)
        yield from _sparse_cases(rng, H, G, D)
    for T, E, K in ((1, 16, 2), (7, 60, 4), (129, 64, 8)):
        yield from _route_cases(rng, T, E, K)
        yield from _expert_cases(rng, T, E, K)
    for R, V in ((1, 17), (5, 260), (33, 4096), (9, 151_936)):
        yield from _sampler_cases(rng, R, V)


def _row_cases(rng: np.random.Generator, T: int, M: int) -> Iterator[OpCase]:
    x, residual, weight = _normal(rng, T, M), _normal(rng, T, M), _normal(rng, M)
    out, at = ((T, M), FP32), f"{T}x{M}"
    eps: Attrs = {"eps": 1e-6}
    yield OpCase(f"rmsnorm {at}", "rmsnorm", (out,), (x, weight), eps)
    yield OpCase(f"add_rmsnorm {at}", "add_rmsnorm", (out, out), (x, residual, weight), eps)
    gate_up = 4 * _normal(rng, T, 2 * M)
    for activation in ACTIVATIONS:
        attrs: Attrs = {"activation": activation}
        yield OpCase(f"{activation} {at}", "gated", (out,), (gate_up,), attrs)
    yield OpCase(f"softcap {at}", "softcap", (out,), (40 * x,), {"cap": 30.0})
    yield OpCase(f"add {at}", "add", (out,), (x, residual), {}, 0.0)
    table = _normal(rng, 50, M)
    yield OpCase(f"embed {at}", "embed", (out,), (_ints(rng, 50, T), table), {"scale": 3.0}, 0.0)
    yield OpCase(f"take_rows {at}", "take_rows", (out,), (table, _ints(rng, 50, T)), {}, 0.0)


def _rope_cases(rng: np.random.Generator) -> Iterator[OpCase]:
    for T, D in ((1, 8), (33, 64), (200, 128)):
        exponents = -np.arange(0, D, 2) / D
        inv_freq = np.array([10000.0**exponents, 500.0**exponents], np.float32)
        ins = (_ints(rng, 4000, T), inv_freq, _ints(rng, 2, T))
        yield OpCase(f"rope_table {T}x{D}", "rope_table", (((T, D), FP32),), ins, {"scale": 1.5})
    for T, H, G, D in ((1, 4, 2, 16), (40, 8, 2, 64), (17, 6, 6, 80)):
        slots = rng.permutation(128)[:T].astype(np.int32)
        zeros = np.zeros((T, G, D), np.float32)
        angles = rng.uniform(0, 6, (T, D // 2))
        cos_sin = np.concatenate((np.cos(angles), np.sin(angles)), axis=1).astype(np.float32)
        ins = (
            Cache(8, 16, zeros, zeros, slots),
            _normal(rng, T, (H + 2 * G) * D),
            cos_sin,
            slots,
        )
        attrs: Attrs = {"num_kv_heads": G, "eps": 1e-6}
        out = (((T, H, D), FP32),)
        yield OpCase(f"rope_kv_write {T}x{H}x{D}", "rope_kv_write", out, ins, attrs)
        for kind, q_heads, k_heads in (("norm", 1, 1), ("row norm", H, G)):
            more = (*ins, _normal(rng, q_heads * D), _normal(rng, k_heads * D))
            yield OpCase(f"rope_kv_write+{kind} {T}x{H}x{D}", "rope_kv_write", out, more, attrs)
        unrotated = (*ins[:2], np.zeros((T, 0), np.float32), slots)
        yield OpCase(f"kv_write {T}x{H}x{D}", "rope_kv_write", out, unrotated, attrs)


def _attention_cases(
    rng: np.random.Generator, H: int, G: int, D: int, S: int = 16
) -> Iterator[OpCase]:
    """Two decoding requests and two prompts' chunks in one call, contexts around a split of 256."""
    contexts, counts = (257, 31, 256, 600), (1, 1, 7, 64)
    columns = -(-max(contexts) // S)
    tables = rng.permutation(4 * columns).reshape(4, columns).astype(np.int32)
    slots = np.concatenate(
        [
            table[np.arange(n) // S] * S + np.arange(n) % S
            for table, n in zip(tables, contexts, strict=True)
        ]
    ).astype(np.int32)
    total, T = len(slots), sum(counts)
    cache = Cache(4 * columns, S, _normal(rng, total, G, D), _normal(rng, total, G, D), slots)
    starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
    ins = (_normal(rng, T, H, D), cache, tables, starts, np.array(contexts, np.int32))
    attrs: Attrs = {"num_kv_heads": G, "scale": D**-0.5}
    outs, at = (((T, H, D), FP32),), f"{H}/{G}x{D}{'' if S == 16 else f', blocks of {S}'}"
    yield OpCase(f"attention {at}", "attention", outs, ins, attrs)
    sinks = _normal(rng, H)
    yield OpCase(f"attention+sinks {at}", "attention", outs, (*ins, sinks), attrs)
    for window in (1, 100, 256):
        more: Attrs = attrs | {"window": window, "softcap": 5.0}
        yield OpCase(f"attention+window {window} {at}", "attention", outs, ins, more)


def _sparse_cases(rng: np.random.Generator, H: int, G: int, D: int) -> Iterator[OpCase]:
    """One row each of four requests, of which two are sparse, one in its dense layers and one within its budget."""
    S, contexts, budgets = 32, (900, 415, 600, 250), (20, 8, 9, 16)
    U, Z, X = 16, 2, 29
    tables = rng.permutation(4 * X).reshape(4, X).astype(np.int32)
    slots = (tables[:, :, None] * S + np.arange(S, dtype=np.int32)).ravel()
    cache = Cache(4 * X, S, _normal(rng, 4 * X * S, G, D), _normal(rng, 4 * X * S, G, D), slots)
    starts, lens = np.arange(5, dtype=np.int32), np.array(contexts, np.int32)
    sparse = (lens, np.array(budgets, np.int32), np.array([0, 0, 3, 0], np.int32))
    attrs: Attrs = {"layer": 2, "block_tokens": S}
    at, lists = f"{H}/{G}x{D}", (4, G, X, Z)
    meta = _normal(rng, 4 * X * Z, G, 2, D)
    meta[:, :, 1] = np.abs(meta[:, :, 1])
    bits = (meta.view(np.uint32) >> 16).astype(np.uint16)
    q = _normal(rng, 4, H, D)
    scored: Attrs = attrs | {"scale": D**-0.5}
    first = slice(0, 2)  # the sparse ones: of others, scores are not written
    out = (((2, G, X, Z), FP32),)
    ins = (q[first], bits, tables[first], starts[:3], *(one[first] for one in sparse))
    yield OpCase(f"block_score {at}", "block_score", out, ins, scored)
    scores = rng.choice(np.array([0, 1, 2, -np.inf], np.float32), lists)
    lists_and_counts = ((lists, INT32), ((4, G), INT32))
    yield OpCase(f"block_topk {at}", "block_topk", lists_and_counts, (scores, *sparse), attrs, 0.0)
    units, metas = rng.permutation(4 * X * Z).astype(np.int32), ((meta.shape, DType.BF16),)
    of_units: Attrs = {"block_tokens": S}
    name = f"block_meta_update {at}"
    ulp = 2**-7  # of bf16: sums in another order may fall to the other side
    yield OpCase(name, "block_meta_update", metas, (cache, units), of_units, ulp)
    counts = np.array([-(-n // U) for n in contexts])
    selected, num_selected = np.zeros((4, G, X * Z), np.int32), np.full((4, G), -1, np.int32)
    for b in (0, 1):
        for g in range(G):
            some = rng.permutation(counts[b] - 1)[: budgets[b] - 1]
            selected[b, g, : budgets[b]] = [*np.sort(some), counts[b] - 1]
            num_selected[b, g] = budgets[b]
    into = (q, cache, tables, starts, lens)
    selection = (selected.reshape(lists), num_selected)
    heads: Attrs = {"num_kv_heads": G, "scale": D**-0.5}
    rows = (((4, H, D), FP32),)
    yield OpCase(f"attention+selection {at}", "attention", rows, (*into, None, *selection), heads)
    more = (*into, *selection, np.array([1, 0, 1, 1], np.int32), _normal(rng, 4, 2))
    yield OpCase(f"kept_mass {at}", "kept_mass", (((4, 2), FP32),), more, heads)


def _route_cases(rng: np.random.Generator, T: int, E: int, K: int) -> Iterator[OpCase]:
    outs, logits, bias = (((T, K), FP32), ((T, K), INT32)), 3 * _normal(rng, T, E), _normal(rng, E)
    for scoring in SCORINGS:
        for renormalize in (False, True):
            attrs: Attrs = {"scoring": scoring, "renormalize": renormalize, "scale": 2.5}
            at = f"{scoring}{'+renormalize' if renormalize else ''} {T}x{E}x{K}"
            yield OpCase(f"moe_route {at}", "moe_route", outs, (logits,), attrs)
            attrs = attrs | {"num_groups": 4, "top_groups": 2}
            for extra in ((), (None, bias)):
                name = f"moe_route in groups{'+bias' if extra else ''} {at}"
                yield OpCase(name, "moe_route", outs, (logits, *extra), attrs)


def _expert_cases(rng: np.random.Generator, T: int, E: int, K: int) -> Iterator[OpCase]:
    N, M, at = 33, 65, f"{T}x{E}x{K}"
    experts, outs = _ints(rng, E, T, K), (((T, K, N), FP32),)
    weight, bias = _normal(rng, E, N, M), _normal(rng, E, N)
    for kind, x in (("shared rows", _normal(rng, T, M)), ("own rows", _normal(rng, T, K, M))):
        ins = (x, experts, weight, bias)
        yield OpCase(f"expert_linear, {kind} {at}", "expert_linear", outs, ins, {})
    to_one = (_normal(rng, T, M), np.full((T, K), E - 1, np.int32), weight)
    yield OpCase(f"expert_linear, all to one {at}", "expert_linear", outs, to_one, {})
    y, weights, out = _normal(rng, T, K, M), _normal(rng, T, K), (((T, M), FP32),)
    for more in ((), (_normal(rng, T, M),), (_normal(rng, T, M), _normal(rng, T, 1))):
        name = f"moe_combine, {('alone', 'shared', 'gated')[len(more)]} {at}"
        yield OpCase(name, "moe_combine", out, (y, weights, *more), {})


def fused_cases() -> Iterator[OpCase]:
    """Ops of fused programs, which the CPU does not have: tiles of every size, few experts and many."""
    rng = np.random.default_rng(6)
    reference = load(Backend.REFERENCE, device="cpu")
    for T, E, K in ((1, 128, 8), (7, 60, 4), (40, 8, 2), (129, 64, 8), (600, 64, 8), (1100, 16, 2)):
        N, M, at = 66, 72, f"{T}x{E}x{K}"
        experts = np.argsort(rng.random((T, E)), axis=1)[:, :K].astype(np.int32)
        outs: Outs = (((T, K), INT32), ((T, K, 3), INT32))
        attrs: Attrs = {"num_experts": E}
        case = OpCase(f"moe_assign {at}", "moe_assign", outs, (experts,), attrs, 0.0)
        if moe_assign.tile_rows(T * K, E) > 1:  # else nothing is written
            yield case
        assignment = outputs(case, reference)
        weight, bias = _normal(rng, E, N, M), _normal(rng, E, N)
        for activation in ACTIVATIONS:
            ins = (_normal(rng, T, M), experts, *assignment, weight, bias)
            outs, attrs = (((T, K, N // 2), FP32),), {"activation": activation}
            yield OpCase(f"expert_gated, {activation} {at}", "expert_gated", outs, ins, attrs)
        ins = (_normal(rng, T, K, M), experts, *assignment, weight)
        yield OpCase(f"expert_down {at}", "expert_down", (((T, K, N), FP32),), ins, {})


def _sampler_cases(rng: np.random.Generator, R: int, V: int) -> Iterator[OpCase]:
    logits = 3 * _normal(rng, R, V)
    vectors = (
        rng.choice([0.0, 0.7, 1.0], R).astype(np.float32),  # temperature
        rng.choice([0, 5], R).astype(np.int32),  # top_k
        rng.choice([1.0, 0.9], R).astype(np.float32),  # top_p
        rng.choice([0.0, 0.05], R).astype(np.float32),  # min_p
        rng.integers(-(2**62), 2**62, R).astype(np.int64),  # seeds
        _ints(rng, 500, R),  # positions
        rng.choice([1.0, 1.3], R).astype(np.float32),  # repetition
        rng.choice([0.0, 0.5], R).astype(np.float32),  # frequency
        rng.choice([0.0, -1.0], R).astype(np.float32),  # presence
        2 * np.arange(R + 1, dtype=np.int32),  # two penalized tokens a row
        np.stack((_ints(rng, V // 2, R), V // 2 + _ints(rng, V // 2, R)), axis=1).ravel(),
        _ints(rng, 4, 2 * R),  # counts
        np.arange(R + 1, dtype=np.int32),  # one biased token a row
        _ints(rng, V, R),
        rng.choice([1.5, -np.inf], R).astype(np.float32),
    )
    outs = (((R,), INT32), ((R, V), FP32))
    yield OpCase(f"sample {R}x{V}", "sample", outs, (logits, *vectors), {})
    K = 5
    tops = (((R,), FP32), ((R,), INT32), ((R, K), INT32), ((R, K), FP32))
    yield OpCase(f"logprobs {R}x{V}", "logprobs", tops, (logits, _ints(rng, V, R)), {})


def _normal(rng: np.random.Generator, *shape: int) -> Array:
    return rng.standard_normal(shape, np.float32)


def _ints(rng: np.random.Generator, end: int, *shape: int) -> Array:
    return rng.integers(0, end, shape).astype(np.int32)
