"""Attention and the cache's writing: right against fp64, blind to everything that is not a row's own context."""

import numpy as np
import pytest

from tests.kernels.arrays import BACKENDS, close, ops_of, out, run
from vivace.kernels.attention import SPLIT_TOKENS
from vivace.kernels.backend import Backend
from vivace.kernels.buffer import DType

S = 16  # tokens per block
each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda one: one.value)


class Paged:
    """Contexts of several requests in one cache, written through the only door, blocks in any order."""

    def __init__(self, ops, lengths, *, G, D, seed=0, order=None, spare=2):
        rng = np.random.default_rng(seed)
        self.ops, self.lengths, self.G, self.D = ops, lengths, G, D
        self.k = [rng.standard_normal((n, G, D), dtype=np.float32) for n in lengths]
        self.v = [rng.standard_normal((n, G, D), dtype=np.float32) for n in lengths]
        needed = [-(-n // S) for n in lengths]
        numbers = np.random.default_rng(seed if order is None else order).permutation(
            sum(needed) + spare
        )
        self.num_blocks = len(numbers)
        self.cache = ops.memory.kv_cache(self.num_blocks, S, G, D, DType.FP32)
        self._poison()
        self.tables = np.full((len(lengths), max(needed, default=0) + 1), -1, np.int32)
        given = iter(numbers)
        for b, (n, count) in enumerate(zip(lengths, needed, strict=True)):
            self.tables[b, :count] = [next(given) for _ in range(count)]
            slots = self.tables[b, np.arange(n) // S] * S + np.arange(n) % S
            self.write(self.k[b], self.v[b], slots)

    def _poison(self):
        """What nobody writes must never be read."""
        nothing = np.full((self.num_blocks * S, self.G, self.D), np.nan, np.float32)
        self.write(nothing, nothing, np.arange(self.num_blocks * S))

    def write(self, k, v, slots):
        """Unrotated: the angle is 0."""
        T = len(k)
        qkv = np.concatenate((np.zeros((T, self.G, self.D), np.float32), k, v), axis=1).reshape(
            T, -1
        )
        table = np.zeros((T, self.D if self.D % 2 == 0 else self.D - 1), np.float32)
        table[:, : table.shape[1] // 2] = 1
        inputs = (qkv, table, slots.astype(np.int32))
        run(self.ops, "rope_kv_write", [out(self.ops, T, self.G, self.D), self.cache], *inputs,
            num_kv_heads=self.G, eps=0.0)  # fmt: skip

    def attend(self, q, counts, context_lens=None, ops=None):
        """Attention of the last `counts[b]` tokens of each context."""
        ops = ops or self.ops
        starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        lens = np.int32(self.lengths if context_lens is None else context_lens)
        buffers = [out(ops, len(q), *q.shape[1:])]
        ops.attention(
            buffers[0],
            *(ops.memory.upload(np.ascontiguousarray(one)) for one in (q,)),
            self.cache,
            *(ops.memory.upload(np.ascontiguousarray(one)) for one in (self.tables, starts, lens)),
            num_kv_heads=self.G,
            scale=self.D**-0.5,
        )
        return ops.memory.read(buffers[0]).copy()

    def want(self, q, counts):
        """The same in fp64, head by head."""
        H, rows, t = q.shape[1], [], 0
        for b, count in enumerate(counts):
            for i in range(count):
                visible = self.lengths[b] - count + i + 1
                heads = []
                for h in range(H):
                    g = h // (H // self.G)
                    k = self.k[b][:visible, g].astype(np.float64)
                    scores = k @ q[t, h].astype(np.float64) * self.D**-0.5
                    p = np.exp(scores - scores.max())
                    heads.append(p / p.sum() @ self.v[b][:visible, g].astype(np.float64))
                rows.append(heads)
                t += 1
        return np.array(rows).reshape(q.shape)


def queries(T, H, D, seed=9):
    return np.random.default_rng(seed).standard_normal((T, H, D), dtype=np.float32)


@each_backend
@pytest.mark.parametrize(
    ("H", "G", "D"), [(1, 1, 8), (4, 2, 16), (8, 2, 64), (8, 1, 80), (3, 3, 10), (2, 1, 256)]
)
def test_decode_rows_and_chunks_in_one_call(backend, H, G, D):
    lengths, counts = (1, 16, 40, 17), (1, 1, 7, 17)
    paged = Paged(ops_of(backend, 2), lengths, G=G, D=D)
    q = queries(sum(counts), H, D)
    close(paged.attend(q, counts), paged.want(q, counts), 3e-6)


@each_backend
@pytest.mark.parametrize("length", (255, 256, 257, 511, 513, 600))
def test_contexts_around_the_splits(backend, length):
    paged = Paged(ops_of(backend), (length,), G=1, D=8)
    q = queries(3, 2, 8)
    close(paged.attend(q, (3,)), paged.want(q, (3,)), 3e-6)


@each_backend
def test_rows_of_nobody_are_zero_and_requests_without_rows_are_passed_over(backend):
    paged = Paged(ops_of(backend, 2), (5, 20, 9), G=2, D=16)
    q = queries(6, 4, 16)
    got = paged.attend(q, (1, 0, 2))
    close(got[:3], paged.want(q[:3], (1, 0, 2)), 3e-6)
    assert (got[3:] == 0).all()


@each_backend
def test_an_empty_step_does_nothing(backend):
    paged = Paged(ops_of(backend), (), G=2, D=16)
    assert paged.attend(queries(0, 4, 16), ()).shape == (0, 4, 16)


def test_where_a_chunk_is_cut_changes_no_bit():
    paged = Paged(ops_of(Backend.CPU), (300,), G=2, D=16)
    q = queries(300, 4, 16)
    whole = paged.attend(q, (300,))
    for chunk in (1, 7, 16, 123):
        parts = [
            paged.attend(q[i : i + chunk], (len(q[i : i + chunk]),), (min(i + chunk, 300),))
            for i in range(0, 300, chunk)
        ]
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("threads", (2, 4))
def test_neighbours_threads_and_block_numbers_change_no_bit(threads):
    alone = Paged(ops_of(Backend.CPU), (290,), G=2, D=64)
    q = queries(2, 8, 64)
    want = alone.attend(q, (2,))
    moved = Paged(ops_of(Backend.CPU, threads), (290, 33, 500), G=2, D=64, order=5)
    more = np.concatenate((q, queries(20, 8, 64, seed=3)))
    slots = moved.tables[0, np.arange(290) // S] * S + np.arange(290) % S
    moved.write(alone.k[0], alone.v[0], slots)
    assert np.array_equal(moved.attend(more, (2, 5, 15))[:2], want)


def test_splits_are_of_256_positions_counted_from_0():
    """One value of 2^24 swallows the ones that are added to it in fp32: those of its own split, and no others."""
    paged = Paged(ops_of(Backend.CPU), (600,), G=1, D=8)
    v = np.ones((600, 1, 8), np.float32)
    v[0] = 2**24
    slots = paged.tables[0, np.arange(600) // S] * S + np.arange(600) % S
    paged.write(paged.k[0], v, slots)
    nothing = np.zeros((1, 1, 8), np.float32)  # every position weighs the same
    want = np.float32(2**24 + (600 - SPLIT_TOKENS)) / np.float32(600)
    assert (paged.attend(nothing, (1,)) == want).all()


@each_backend
@pytest.mark.parametrize("norms", (False, True))
@pytest.mark.parametrize(
    ("H", "G", "D", "R"), [(4, 2, 16, 16), (2, 2, 8, 4), (8, 1, 64, 64), (1, 1, 2, 2)]
)
def test_q_and_k_are_normed_and_rotated_and_v_is_kept(backend, norms, H, G, D, R):
    T, rng = 9, np.random.default_rng(H)
    ops = ops_of(backend, 2)
    qkv = rng.standard_normal((T, (H + 2 * G) * D), dtype=np.float32)
    angles = rng.uniform(-3, 3, (T, R // 2)).astype(np.float32)
    table = np.hstack((np.cos(angles), np.sin(angles)))
    slots = rng.permutation(4 * S)[:T].astype(np.int32)
    slots[3] = -1  # is not written
    weights = (
        [rng.standard_normal(D, dtype=np.float32) for _ in range(2)] if norms else [None, None]
    )
    cache = ops.memory.kv_cache(4, S, G, D, DType.FP32)
    q, _ = run(ops, "rope_kv_write", [out(ops, T, H, D), cache], qkv, table, slots, *weights,
               num_kv_heads=G, eps=1e-6)  # fmt: skip
    parts = np.split(qkv.reshape(T, H + 2 * G, D).astype(np.float64), (H, H + G), axis=1)
    wanted = []
    for x, weight in zip(parts[:2], weights, strict=True):
        if weight is not None:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight
        first, second, rest = np.split(x, (R // 2, R), axis=2)
        cos, sin = (
            np.cos(angles)[:, None].astype(np.float64),
            np.sin(angles)[:, None].astype(np.float64),
        )
        wanted.append(
            np.concatenate((first * cos - second * sin, second * cos + first * sin, rest), axis=2)
        )
    close(q, wanted[0])
    written = slots >= 0
    k, v = out(ops, T - 1, G, D), out(ops, T - 1, G, D)
    ops.kv_read(k, v, cache, ops.memory.upload(slots[written]))
    close(ops.memory.read(k), wanted[1][written])
    assert np.array_equal(ops.memory.read(v), parts[2][written].astype(np.float32))
    unwritten = np.setdiff1d(np.arange(4 * S), slots).astype(np.int32)
    k, v = out(ops, len(unwritten), G, D), out(ops, len(unwritten), G, D)
    ops.kv_read(k, v, cache, ops.memory.upload(unwritten))
    assert (ops.memory.read(k) == 0).all() and (ops.memory.read(v) == 0).all()
