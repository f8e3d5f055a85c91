"""Contexts of several requests in one paged cache, and what attention over them should be, in fp64."""

import numpy as np
import torch

from tests.kernels.arrays import out, run
from vivace.kernels.buffer import DType
from vivace.kernels.kv_read.reference import narrowed, widened
from vivace.kernels.memory.triton import TritonMemory

S = 16  # tokens per block, unless a test says other


class Paged:
    """Contexts of several requests in one cache, written through the only door, blocks in any order."""

    def __init__(self, ops, lengths, *, G, D, seed=0, order=None, spare=2, S=S, dtype=DType.FP32):
        rng = np.random.default_rng(seed)
        self.ops, self.lengths, self.G, self.D, self.S = ops, lengths, G, D, S
        self.k = [rng.standard_normal((n, G, D), dtype=np.float32) for n in lengths]
        self.v = [rng.standard_normal((n, G, D), dtype=np.float32) for n in lengths]
        needed = [-(-n // S) for n in lengths]
        numbers = np.random.default_rng(seed if order is None else order).permutation(
            sum(needed) + spare
        )
        self.num_blocks = len(numbers)
        self.cache = ops.memory.kv_cache(self.num_blocks, S, G, D, dtype)
        self._poison()
        self.tables = np.full((len(lengths), max(needed, default=0) + 1), -1, np.int32)
        given = iter(numbers)
        for b, (n, count) in enumerate(zip(lengths, needed, strict=True)):
            self.tables[b, :count] = [next(given) for _ in range(count)]
            slots = self.tables[b, np.arange(n) // S] * S + np.arange(n) % S
            self.write(self.k[b], self.v[b], slots)
            if dtype is not DType.FP32:  # what was rounded is what is attended to
                self.k[b], self.v[b] = self.read(slots)

    def _poison(self):
        """What nobody writes must never be read."""
        nothing = np.full((self.num_blocks * self.S, self.G, self.D), np.nan, np.float32)
        self.write(nothing, nothing, np.arange(self.num_blocks * self.S))

    def write(self, k, v, slots):
        """Unrotated: the angle is 0."""
        if isinstance(self.ops.memory, TritonMemory):  # interpreting a kernel of its own takes long
            for i, heads in enumerate((k, v)):
                at = (slots // self.S, i, slice(None), slots % self.S)
                self.cache[at] = narrowed(torch.from_numpy(heads), self.cache.dtype)
            return
        T = len(k)
        qkv = np.concatenate((np.zeros((T, self.G, self.D), np.float32), k, v), axis=1)
        qkv = qkv.reshape(T, 3 * self.G * self.D)
        table = np.zeros((T, self.D if self.D % 2 == 0 else self.D - 1), np.float32)
        table[:, : table.shape[1] // 2] = 1
        inputs = (qkv, table, slots.astype(np.int32))
        run(self.ops, "rope_kv_write", [out(self.ops, T, self.G, self.D), self.cache], *inputs,
            num_kv_heads=self.G, eps=0.0)  # fmt: skip

    def read(self, slots):
        """K and V of these slots, in fp32."""
        if isinstance(self.ops.memory, TritonMemory):
            rows = [self.cache[slots // self.S, i, :, slots % self.S] for i in (0, 1)]
            return [widened(one, self.D).numpy() for one in rows]
        outs = [out(self.ops, len(slots), self.G, self.D) for _ in "kv"]
        return run(self.ops, "kv_read", [*outs, self.cache], slots.astype(np.int32))[:2]

    def forget(self, counts, window):
        """What lies left of the windows of the last `counts[b]` tokens becomes NaN, its blocks nonsense."""
        S = self.S
        for b, (n, count) in enumerate(zip(self.lengths, counts, strict=True)):
            first = max(0, n - count - window + 1)
            slots = self.tables[b, np.arange(first) // S] * S + np.arange(first) % S
            nothing = np.full((first, self.G, self.D), np.nan, np.float32)
            self.write(nothing, nothing, slots)
            self.tables[b, : first // S] = 2**30

    def attend(self, q, counts, context_lens=None, sinks=None, **attrs):
        """Attention of the last `counts[b]` tokens of each context."""
        ops = self.ops
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        lens = np.int32(self.lengths if context_lens is None else context_lens)
        upload = ops.memory.upload
        result = out(ops, *q.shape)
        arrays = [upload(np.ascontiguousarray(one)) for one in (self.tables, starts, lens)]
        arrays.append(None if sinks is None else upload(sinks))
        attrs |= {"num_kv_heads": self.G, "scale": self.D**-0.5}
        ops.attention(result, upload(np.ascontiguousarray(q)), self.cache, *arrays, **attrs)
        return ops.memory.read(result).copy()

    def want(self, q, counts, sinks=None, window=0, softcap=0.0, kept=None):
        """The same in fp64, head by head. `kept[b][g]`: the positions that are selected."""
        H, rows, t = q.shape[1], [], 0
        for b, count in enumerate(counts):
            for i in range(count):
                end = self.lengths[b] - count + i + 1
                begin = max(0, end - window) if window else 0
                heads = []
                for h in range(H):
                    g = h // (H // self.G)
                    seen = np.arange(begin, end) if kept is None else kept[b][g]
                    k = self.k[b][seen, g].astype(np.float64)
                    scores = k @ q[t, h].astype(np.float64) * self.D**-0.5
                    if softcap:
                        scores = softcap * np.tanh(scores / softcap)
                    if sinks is not None:
                        scores = np.append(scores, np.float64(sinks[h]))
                    p = np.exp(scores - scores.max())
                    p = (p / p.sum())[: len(seen)]
                    heads.append(p @ self.v[b][seen, g].astype(np.float64))
                rows.append(heads)
                t += 1
        return np.array(rows).reshape(q.shape)


def queries(T, H, D, seed=9):
    """Random rows of queries."""
    return np.random.default_rng(seed).standard_normal((T, H, D), dtype=np.float32)
