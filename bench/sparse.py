"""Block-sparse decode beside dense attention, and whether it finds what dense attention finds. Needs no model.

Time: one request over random bf16 keys and values, in the caches of so many layers that none stays in the processor's. Dense,
sparse and the memory's bandwidth take turns in every round.
Needle: four neighbouring tokens that hold half of a query's attention, the rest random; found if their unit is selected.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from vivace.bench.result import Figure, figure
from vivace.kernels.backend import Backend, Ops, load
from vivace.kernels.buffer import DType
from vivace.kernels.cpu.library import Library
from vivace.kernels.cpu.probe import probe_read
from vivace.kernels.recorder import Replay
from vivace.kernels.selection import RECENT_UNITS, SINK_UNITS, UNIT_TOKENS

Array = np.ndarray[Any, Any]
H, G, D, S = 32, 8, 128, 16
PROBE_BYTES = 128 << 20  # of each thread
NEEDLE_TOKENS = 4


@dataclass(frozen=True, slots=True)
class Load:
    """How much is run."""

    rounds: int = 20
    context: int = 32_768
    budget: int = 2_048  # tokens
    layers: int = 6


class Layer:
    """One layer's cache and metadata, and the replays of its ops for one request of one row."""

    def __init__(self, ops: Ops, at: Load, seed: int) -> None:
        rng, num_blocks = np.random.default_rng(seed), at.context // S
        memory = ops.memory
        self.cache = memory.read(memory.kv_cache(num_blocks, S, G, D, DType.BF16))
        bits = np.frombuffer(rng.bytes(self.cache.nbytes), np.uint16)
        self.cache.reshape(-1)[:] = bits & 0x807F | 0x3F00  # 0.5 to 1, either sign
        self.meta = memory.empty((num_blocks, G, 2, D), DType.BF16)
        units = np.arange(num_blocks, dtype=np.int32)
        ops.block_meta_update(self.meta, self.cache, units, block_tokens=S)
        self._table = rng.permutation(num_blocks).astype(np.int32)[None]
        self._q = rng.standard_normal((1, H, D), dtype=np.float32)
        self._out = np.zeros_like(self._q)
        self._lens, self._starts = _ints(at.context), _ints(0, 1)
        self._budgets, self._dense_layers = _ints(at.budget // UNIT_TOKENS), _ints(0)
        self._scores = np.zeros((1, G, num_blocks, 1), np.float32)
        self._selected = np.zeros_like(self._scores, np.int32)
        self._counts = np.zeros((1, G), np.int32)
        assert ops.recorder is not None
        self.dense: Replay = ops.recorder.record(lambda _sizes: self._attend(ops), ())
        self.sparse: Replay = ops.recorder.record(lambda _sizes: self._select(ops), ())

    def _attend(self, ops: Ops, *selection: Array) -> None:
        inputs = (self._q, self.cache, self._table, self._starts, self._lens)
        ops.attention(self._out, *inputs, None, *selection, num_kv_heads=G, scale=D**-0.5)

    def _select(self, ops: Ops) -> None:
        requests = (self._lens, self._budgets, self._dense_layers)
        into = (self._q, self.meta, self._table, self._starts, *requests)
        ops.block_score(self._scores, *into, layer=0, scale=D**-0.5, block_tokens=S)
        lists = (self._selected, self._counts)
        ops.block_topk(*lists, self._scores, *requests, layer=0, block_tokens=S)
        self._attend(ops, *lists)


def measure(threads: int, at: Load) -> list[Figure]:
    """Times and rates of a layer's decode step, by round, then needles in contexts from half to twice as long."""
    figures = _times(threads, at)
    ops = load(Backend.CPU, threads=threads)
    for context in (at.context // 2, at.context, at.context * 2):
        for heads in (1, H // G):
            figures += _needle_figures(needles(ops, context, budget=at.budget, heads=heads))
    return figures


def _times(threads: int, at: Load) -> list[Figure]:
    ops, library = load(Backend.CPU, threads=threads), Library(threads=threads)
    layers = [Layer(ops, at, seed) for seed in range(at.layers)]
    names = [name for name, _ in layers[0].sparse.profile(())]
    dense, parts, reads, alone = [], [], [], []
    for _ in range(at.rounds):
        reads.append(max(probe_read(library, repeats=3, num_bytes=PROBE_BYTES)))
        of_dense = [one.dense.profile(())[0][1] for one in layers]
        of_sparse = [[seconds for _, seconds in one.sparse.profile(())] for one in layers]
        alone.append((min(of_dense), min(map(sum, of_sparse))))
        dense.append(sum(of_dense) / at.layers)
        parts.append([sum(part) / at.layers for part in zip(*of_sparse, strict=True)])
    sparse = [sum(part) for part in parts]
    kv_bytes = at.context * G * D * 2 * 2
    rates = [kv_bytes / seconds for seconds in dense]
    shares = [100 * rate / read for rate, read in zip(rates, reads, strict=True)]
    ratios = [whole / part for whole, part in zip(dense, sparse, strict=True)]
    figures = [
        figure("read bandwidth, GB/s", [one / 1e9 for one in reads]),
        figure("dense attention, ms", [one * 1e3 for one in dense]),
        figure("dense attention, GB/s", [one / 1e9 for one in rates]),
        figure("dense attention, % of read bandwidth", shares),
        figure("sparse decode, ms", [one * 1e3 for one in sparse]),
        figure("dense / sparse", ratios),
    ]
    for name, values in zip(names, zip(*parts, strict=True), strict=True):
        figures.append(figure(f"sparse decode, {name}, ms", [one * 1e3 for one in values]))
    least_dense, least_sparse = (min(values) for values in zip(*alone, strict=True))
    share = 100 * kv_bytes / least_dense / max(reads)
    figures.append(figure("dense / sparse, least of each", [least_dense / least_sparse]))
    figures.append(figure("dense attention, % of read bandwidth, best of each", [share]))
    return figures


@dataclass(frozen=True, slots=True)
class Found:
    """Of the needles at some depths of one context."""

    context: int
    heads: int  # query heads of the group that attend to the needle
    selected: int
    at_random: int
    least_mass: float  # of dense attention that a needle holds, in any of those heads


def needles(
    ops: Ops, context: int, *, budget: int, heads: int, depths: int = 20, seed: int = 0
) -> Found:
    """Hide a needle at each depth in turn; one KV head, with four query heads."""
    rng, num_blocks, group = np.random.default_rng(seed), context // S, H // G
    k = rng.standard_normal((context, D), dtype=np.float32)
    q = rng.standard_normal((1, group, D), dtype=np.float32)
    cache = ops.memory.read(ops.memory.kv_cache(num_blocks, S, 1, D, DType.BF16))
    meta = ops.memory.empty((num_blocks, 1, 2, D), DType.BF16)
    table = rng.permutation(num_blocks).astype(np.int32)
    _write(ops, cache, k, _slots(table, np.arange(context)))
    ops.block_meta_update(meta, cache, table, block_tokens=S)
    requests = _ints(context), _ints(budget // UNIT_TOKENS), _ints(0)
    scores = np.zeros((1, 1, num_blocks, 1), np.float32)
    selected, counts = np.zeros_like(scores, np.int32), np.zeros((1, 1), np.int32)
    chosen, at_random, masses = 0, 0, []
    for first in _places(rng, context, depths):
        tokens = np.arange(first, first + NEEDLE_TOKENS)
        needle, mass = _needle(rng, k, q[0, :heads], tokens)
        masses.append(mass)
        _write(ops, cache, needle, _slots(table, tokens))
        unit = int(tokens[0]) // S
        here = table[unit : unit + 1]
        ops.block_meta_update(meta, cache, here, block_tokens=S)
        into = (q, meta, table[None], _ints(0, 1), *requests)
        ops.block_score(scores, *into, layer=0, scale=D**-0.5, block_tokens=S)
        ops.block_topk(selected, counts, scores, *requests, layer=0, block_tokens=S)
        chosen += unit in selected.ravel()[: counts[0, 0]]
        others = num_blocks - SINK_UNITS - RECENT_UNITS
        guesses = rng.permutation(others)[: counts[0, 0] - SINK_UNITS - RECENT_UNITS] + SINK_UNITS
        at_random += unit in guesses
        _write(ops, cache, k[tokens], _slots(table, tokens))
        ops.block_meta_update(meta, cache, here, block_tokens=S)
    return Found(context, heads, chosen, at_random, min(masses))


def _needle_figures(one: Found) -> list[Figure]:
    name = f"needles of 20 in {one.context}, {one.heads} of {H // G} heads"
    return [
        figure(f"{name}, selected", [one.selected]),
        figure(f"{name}, at random", [one.at_random]),
        figure(f"{name}, least mass", [one.least_mass]),
    ]


def _places(rng: np.random.Generator, context: int, depths: int) -> Iterator[int]:
    """Where needles begin: within one unit, none in those that are always selected."""
    first, last = SINK_UNITS, context // S - RECENT_UNITS - 1
    for depth in range(depths):
        unit = first + round((last - first) * depth / max(1, depths - 1))
        yield unit * S + int(rng.integers(0, S - NEEDLE_TOKENS + 1))


def _needle(rng: np.random.Generator, k: Array, q: Array, tokens: Array) -> tuple[Array, float]:
    """Keys that hold half of each of these queries' attention or a little more, and the least of what they hold."""
    scores = np.delete(q @ k.T, tokens, axis=1).astype(np.float64) * D**-0.5
    rest = np.log(np.exp(scores).sum(1))  # so much must their own be
    noise = rng.standard_normal((NEEDLE_TOKENS, D), dtype=np.float32)
    strength = 0.5
    while True:
        keys = noise + strength * np.linalg.pinv(q).sum(1) * D**0.5 * rest.max()
        own = np.log(np.exp(q @ keys.T.astype(np.float64) * D**-0.5).sum(1))
        mass = float((1 / (1 + np.exp(rest - own))).min())
        if mass >= 0.505:  # of which rounding to bf16 may take some
            return keys.astype(np.float32), mass
        strength += 0.01


def _ints(*values: int) -> Array:
    return np.array(values, np.int32)


def _slots(table: Array, positions: Array) -> Array:
    slots: Array = table[positions // S] * S + positions % S
    return slots.astype(np.int32)


def _write(ops: Ops, cache: Array, k: Array, slots: Array) -> None:
    """Keys as they are; the values do not matter."""
    empty = np.zeros((len(k), 0), np.float32)
    rows = np.concatenate((k, k, k), axis=1)
    unused = np.empty((len(k), 1, D), np.float32)
    ops.rope_kv_write(unused, cache, rows, empty, slots, num_kv_heads=1, eps=1.0)
