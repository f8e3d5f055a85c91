"""Rotary tables, and norm, rotation and cache writing after the qkv projection: right against fp64."""

import numpy as np
import pytest

from tests.kernels.arrays import EVERYWHERE, close, ops_of, out, run
from vivace.kernels.backend import Backend
from vivace.kernels.buffer import DType

S = 16  # tokens per block
EPS = 1e-6
NORMS = ("none", "head", "row")

each_backend = pytest.mark.parametrize("backend", EVERYWHERE, ids=lambda one: one.value)


def table64(positions, inv_freq):
    angles = (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)  # one rounding
    return np.hstack((np.cos(angles), np.sin(angles)))


@each_backend
@pytest.mark.parametrize("scale", (1.0, 1.25))
@pytest.mark.parametrize("W", (1, 2, 3))
def test_rope_table(backend, scale, W):
    ops = ops_of(backend, 2)
    positions = np.int32([0, 1, 2, 511, 2047, 131071] * 3)
    exponents = np.arange(0, 16, 2, dtype=np.float32) / 16
    inv_freq = np.float32([1 / base**exponents for base in (10000, 500, 1e6)[:W]])
    [got] = run(ops, "rope_table", [out(ops, 18, 16)], positions, inv_freq, scale=scale)
    close(got, table64(positions, inv_freq[0]) * scale, 1e-7)
    variants = np.random.default_rng(W).integers(0, W, 18).astype(np.int32)
    variants[0] = W - 1
    ins = (positions, inv_freq, variants)
    [got] = run(ops, "rope_table", [out(ops, 18, 16)], *ins, scale=scale)
    close(got, table64(positions, inv_freq[variants]) * scale, 1e-7)


@each_backend
@pytest.mark.parametrize("T", (0, 1, 9))
def test_a_table_may_have_no_columns_or_no_rows(backend, T):
    ops, positions = ops_of(backend), np.arange(T, dtype=np.int32)
    for half, variants in ((0, None), (0, positions * 0), (4, None)):
        ins = (positions, np.ones((2, half), np.float32), variants)
        [got] = run(ops, "rope_table", [out(ops, T, 2 * half)], *ins, scale=1.0)
        assert got.shape == (T, 2 * half) and not np.isnan(got).any()


class Case:
    """Inputs of one call, and what should come out of it in fp64."""

    def __init__(self, T, H, G, D, R, norm, seed=0):
        rng = np.random.default_rng(seed + H)
        self.G, self.shape = G, (T, H, D)
        self.qkv = rng.standard_normal((T, (H + 2 * G) * D), dtype=np.float32)
        angles = rng.uniform(-3, 3, (T, R // 2)).astype(np.float32)
        self.table = np.hstack((np.cos(angles), np.sin(angles)))
        self.slots = rng.permutation(4 * S)[:T].astype(np.int32)
        sizes = {"none": (), "head": (D, D), "row": (H * D, G * D)}[norm]
        self.norms = [rng.standard_normal(size, dtype=np.float32) for size in sizes] or [None, None]

    def call(self, ops, cache, rows=slice(None)):
        """The queries of some rows; keys and values go to the cache."""
        T, (_, H, D) = len(self.slots[rows]), self.shape
        ins = (self.qkv[rows], self.table[rows], self.slots[rows], *self.norms)
        q, _ = run(ops, "rope_kv_write", [out(ops, T, H, D), cache], *ins,
                   num_kv_heads=self.G, eps=EPS)  # fmt: skip
        return q

    def want(self):
        """q, k and v."""
        (T, H, D), G = self.shape, self.G
        parts = np.split(self.qkv.reshape(T, H + 2 * G, D).astype(np.float64), (H, H + G), axis=1)
        wanted = [self._rotated(*pair) for pair in zip(parts[:2], self.norms, strict=True)]
        return *wanted, parts[2]

    def _rotated(self, x, weight):
        half = self.table.shape[1] // 2
        if weight is not None and len(weight) == x.shape[2]:
            x = x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * weight
        elif weight is not None:
            x = x / np.sqrt((x**2).mean((1, 2), keepdims=True) + EPS) * weight.reshape(x.shape[1:])
        cos, sin = np.split(self.table[:, None].astype(np.float64), 2, axis=2)
        first, second, rest = np.split(x, (half, 2 * half), axis=2)
        rotated = (first * cos - second * sin, second * cos + first * sin, rest)
        return np.concatenate(rotated, axis=2)


def read(ops, cache, slots, G, D):
    """Keys and values at slots."""
    k, v = out(ops, len(slots), G, D), out(ops, len(slots), G, D)
    ops.kv_read(k, v, cache, ops.memory.upload(slots))
    return ops.memory.read(k).copy(), ops.memory.read(v).copy()


@each_backend
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("H", "G", "D", "R"),
    [
        (4, 2, 16, 16),
        (2, 2, 8, 4),
        (8, 1, 64, 64),
        (1, 1, 2, 2),
        (3, 1, 80, 32),
        (4, 2, 96, 0),
        (2, 1, 128, 128),
        (2, 2, 256, 64),
        (5, 5, 3, 0),
    ],
)
def test_q_and_k_are_normed_and_rotated_and_v_is_kept(backend, norm, H, G, D, R):
    case, ops = Case(9, H, G, D, R, norm), ops_of(backend, 2)
    case.slots[3] = -1  # is not written
    cache = ops.memory.kv_cache(4, S, G, D, DType.FP32)
    q = case.call(ops, cache)
    wanted_q, wanted_k, wanted_v = case.want()
    close(q, wanted_q)
    written = case.slots >= 0
    k, v = read(ops, cache, case.slots[written], G, D)
    close(k, wanted_k[written])
    assert np.array_equal(v, wanted_v[written].astype(np.float32))
    unwritten = np.setdiff1d(np.arange(4 * S), case.slots).astype(np.int32)
    k, v = read(ops, cache, unwritten, G, D)
    assert (k == 0).all() and (v == 0).all()


@each_backend
@pytest.mark.parametrize("norm", NORMS)
def test_an_empty_step_writes_nothing(backend, norm):
    case, ops = Case(0, 4, 2, 16, 16, norm), ops_of(backend, 2)
    cache = ops.memory.kv_cache(4, S, 2, 16, DType.FP32)
    assert case.call(ops, cache).shape == (0, 4, 16)
    assert (ops.memory.read(cache) == 0).all()


@each_backend
@pytest.mark.parametrize(
    ("q_norm", "k_norm"), [(64, 16), (16, 32), (32, 32), (64, 64), (16, None), (None, 32)]
)
def test_norms_of_two_kinds_are_refused(backend, q_norm, k_norm):
    case, ops = Case(2, 4, 2, 16, 16, "none"), ops_of(backend)
    case.norms = [None if n is None else np.ones(n, np.float32) for n in (q_norm, k_norm)]
    with pytest.raises(ValueError, match="_norm"):
        case.call(ops, ops.memory.kv_cache(4, S, 2, 16, DType.FP32))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("threads", (1, 4))
def test_no_row_depends_on_its_neighbours_or_the_threads(norm, threads):
    case, alone, many = (
        Case(33, 4, 2, 24, 16, norm),
        ops_of(Backend.CPU),
        ops_of(Backend.CPU, threads),
    )
    caches = [ops.memory.kv_cache(4, S, 2, 24, DType.FP32) for ops in (alone, many)]
    whole = case.call(many, caches[1])
    for start, end in ((0, 1), (1, 2), (2, 7), (7, 33)):
        part = case.call(alone, caches[0], slice(start, end))
        assert np.array_equal(part, whole[start:end])
    assert np.array_equal(alone.memory.read(caches[0]), many.memory.read(caches[1]))


@each_backend
@pytest.mark.parametrize("dtype", (DType.BF16, DType.INT8))
@pytest.mark.parametrize(("T", "G", "D"), [(1, 1, 1), (20, 2, 10), (33, 3, 64)])
def test_a_cache_of_fewer_bits_holds_the_nearest_numbers(backend, dtype, T, G, D):
    """To the last bit; and of what nobody wrote nothing changes."""
    rng = np.random.default_rng(T)
    ops = ops_of(backend, 2)
    cache = ops.memory.kv_cache(4, S, G, D, dtype)
    qkv = rng.standard_normal((T, 3, G, D), dtype=np.float32)
    qkv[0, 1:] = 0
    qkv[-1] *= 1e-30
    slots = rng.permutation(4 * S)[:T].astype(np.int32)
    run(ops, "rope_kv_write", [out(ops, T, G, D), cache], qkv.reshape(T, -1),
        np.zeros((T, 0), np.float32), slots, num_kv_heads=G, eps=0.0)  # fmt: skip
    every = np.arange(4 * S, dtype=np.int32)
    outs = [out(ops, 4 * S, G, D), out(ops, 4 * S, G, D), cache]
    held = run(ops, "kv_read", outs, every)[:2]
    for got, x in zip(held, (qkv[:, 1], qkv[:, 2]), strict=True):
        want = np.zeros((4 * S, G, D), np.float32)
        want[slots] = as_held(x, dtype)
        assert np.array_equal(got, want)


def as_held(x, dtype):
    """The contract's words, in NumPy."""
    if dtype is DType.BF16:
        bits = x.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).view(np.float32)
    low, high = x.min(-1, keepdims=True), x.max(-1, keepdims=True)
    scale = np.where(high >= -low, high, low) / np.float32(-128)
    scale[scale == 0] = 1
    return np.clip(np.rint(x * (np.float32(1) / scale)), -128, 127) * scale


@each_backend
@pytest.mark.parametrize("dtype", (DType.BF16, DType.INT8))
def test_a_head_with_a_number_that_is_none_is_not_made_whole(backend, dtype):
    """Of int8 all of the head is lost, of bf16 the number; no other head is."""
    ops, slots = ops_of(backend), np.int32([3, 7])
    cache = ops.memory.kv_cache(1, S, 2, 6, dtype)
    qkv = np.ones((2, 3, 2, 6), np.float32)
    qkv[1, 1:, 1, 4] = np.nan
    run(ops, "rope_kv_write", [out(ops, 2, 2, 6), cache], qkv.reshape(2, -1),
        np.zeros((2, 0), np.float32), slots, num_kv_heads=2, eps=0.0)  # fmt: skip
    lost = np.isnan(qkv[:, 1]) if dtype is DType.BF16 else np.isnan(qkv[:, 1]).any(2, keepdims=True)
    for held in read(ops, cache, slots, 2, 6):
        assert np.array_equal(np.isnan(held), np.broadcast_to(lost, held.shape))


@each_backend
def test_a_cache_of_another_type_is_refused(backend):
    ops = ops_of(backend)
    outs = [out(ops, 1, 2, 4), out(ops, 1, 2, 4)]
    with pytest.raises(ValueError, match=r"kv_cache must hold .* got .*int32"):
        ops.kv_read(*outs, out(ops, 1, 2, 2, 2, 4, dtype=np.int32), out(ops, 1, dtype=np.int32))
