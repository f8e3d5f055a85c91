"""Attention in Triton: what it promises bit by bit, and what only its kernels, splits and tiles can get wrong."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.kernels.arrays import close, ops_of
from tests.kernels.paged import Paged, queries
from vivace.kernels.attention import tiles
from vivace.kernels.attention.triton import bind
from vivace.kernels.backend import Backend
from vivace.kernels.buffer import DType
from vivace.kernels.gpu.launcher import Config, Launcher

pytestmark = pytest.mark.triton

SINKS = np.float32([0.5, -3, 8, -np.inf])
TOLERANCE = {DType.FP32: 3e-6, DType.BF16: 1e-2, DType.INT8: 1e-2}  # a product takes bf16
DECODE = Config({"BLOCK_N": 16, "SPLIT": 32})
PREFILL = Config({"BLOCK_M": 16, "BLOCK_N": 16})


@pytest.fixture
def exact_products(monkeypatch):
    """BLAS gives a row other bits elsewhere in a tile, tensor cores do not: products in fp64 hide that."""

    def dot(self, a, b, d, *options):
        product = np.matmul(a.data.astype(np.float64), b.data.astype(np.float64)) + d.data
        return TensorHandle(product.astype(d.data.dtype), d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)


def paged_on(launcher, lengths, **shape):
    """Contexts in a cache whose attention goes through this launcher."""
    ops = replace(ops_of(Backend.TRITON), attention=bind(launcher))
    paged = Paged(ops, lengths, **shape)
    paged.tables[paged.tables == -1] = 2**30  # entries past a request's end
    return paged


def launcher_of(decode=DECODE, prefill=PREFILL):
    """A launcher of these tiles: small ones, so that small shapes have many."""
    launcher = Launcher("cpu")
    launcher.config = lambda op, bucket, default: {"attn_decode": decode}.get(op, prefill)
    return launcher


@pytest.mark.parametrize(
    ("H", "G", "D", "S"),
    [(5, 1, 8, 1), (14, 2, 64, 12), (26, 1, 96, 3), (3, 3, 1, 8), (6, 2, 144, 48)],
)
def test_blocks_and_heads_that_fit_no_tile(H, G, D, S):
    lengths, counts = (30, 70, 13), (3, 19, 13)
    paged = paged_on(launcher_of(), lengths, G=G, D=D, S=S)
    q = queries(sum(counts), H, D)
    close(paged.attend(q, counts), paged.want(q, counts), 3e-6)
    want = paged.want(q, counts, window=11)
    paged.forget(counts, 11)
    close(paged.attend(q, counts, window=11), want, 3e-6)


@pytest.mark.parametrize("window", (1, 17, 100, 257, 1000))
def test_nothing_left_of_a_window_is_read(window):
    lengths, counts = (1, 256, 257, 600, 40), (1, 1, 3, 20, 40)
    paged = paged_on(Launcher("cpu"), lengths, G=1, D=8)
    q = queries(sum(counts), 2, 8)
    want = paged.want(q, counts, window=window)
    paged.forget(counts, window)
    close(paged.attend(q, counts, window=window), want, 3e-6)


@pytest.mark.parametrize("dtype", (DType.FP32, DType.BF16, DType.INT8))
@pytest.mark.parametrize("window", (0, 20))
@pytest.mark.parametrize("softcap", (0.0, 1.5))
@pytest.mark.parametrize("has_sinks", (False, True))
def test_every_combination(dtype, window, softcap, has_sinks):
    lengths, counts = (1, 40, 130), (1, 7, 2)
    paged = paged_on(launcher_of(), lengths, G=2, D=20, dtype=dtype)
    q, sinks = 3 * queries(sum(counts), 4, 20), SINKS if has_sinks else None
    want = paged.want(q, counts, sinks, window, softcap)
    if window:
        paged.forget(counts, window)
    got = paged.attend(q, counts, sinks=sinks, window=window, softcap=softcap)
    close(got, want, 2 * TOLERANCE[dtype])


@settings(max_examples=10)
@given(
    requests=st.lists(st.tuples(st.integers(1, 200), st.integers(0, 40)), min_size=1, max_size=2),
    G=st.integers(1, 2),
    heads=st.integers(1, 17),
    D=st.sampled_from((8, 64, 80, 96, 128, 256)) | st.integers(1, 40),
    block_tokens=st.sampled_from((16, 64)) | st.integers(1, 40),
    window=st.just(0) | st.integers(1, 200),
    softcap=st.sampled_from((0.0, 2.0, 30.0)),
    has_sinks=st.booleans(),
    dtype=st.sampled_from((DType.FP32, DType.BF16)),
    seed=st.integers(0, 1000),
)
def test_no_shape_is_different(
    requests, G, heads, D, block_tokens, window, softcap, has_sinks, dtype, seed
):
    lengths = [length for length, _ in requests]
    counts = [min(count, length) for length, count in requests]
    decode = Config({"BLOCK_N": 32, "SPLIT": 64})
    prefill = Config({"BLOCK_M": 32, "BLOCK_N": 32})
    launcher = launcher_of(decode, prefill)
    paged = paged_on(launcher, lengths, G=G, D=D, S=block_tokens, seed=seed, dtype=dtype)
    q, rng = queries(sum(counts), G * heads, D, seed), np.random.default_rng(seed)
    sinks = rng.standard_normal(G * heads, dtype=np.float32) if has_sinks else None
    want = paged.want(q, counts, sinks, window, softcap)
    if window:
        paged.forget(counts, window)
    got = paged.attend(q, counts, sinks=sinks, window=window, softcap=softcap)
    assert got.shape == want.shape and not np.isnan(got).any()
    limit = 2e-5 if dtype is DType.FP32 else 3e-2
    assert np.abs(got - want).max(initial=0) <= limit  # values are about 1


@pytest.mark.parametrize("dtype", (DType.FP32, DType.BF16))
@pytest.mark.parametrize(("D", "S"), [(16, 16), (80, 32)])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (21, 5.0)])
def test_boxes_of_the_tensor_memory_accelerator_change_no_bit(dtype, D, S, window, softcap):
    lengths, counts = (33, 70, 5), (33, 25, 1)
    q = queries(sum(counts), 4, D)
    got = []
    for has_tma in (False, True):
        launcher = launcher_of()
        launcher.has_tma = has_tma
        paged = paged_on(launcher, lengths, G=2, D=D, S=S, dtype=dtype)
        want = paged.want(q, counts, None, window, softcap)
        if window:
            paged.forget(counts, window)
        got.append(paged.attend(q, counts, window=window, softcap=softcap))
        close(got[-1], want, TOLERANCE[dtype])
    assert np.array_equal(*got)


def test_a_context_is_the_same_wherever_its_blocks_lie():
    lengths, counts = (90, 45), (1, 40)
    q = queries(sum(counts), 4, 16)
    first = paged_on(launcher_of(), lengths, G=2, D=16, order=1)
    second = paged_on(launcher_of(), lengths, G=2, D=16, order=2)
    assert not np.array_equal(first.tables, second.tables)
    assert np.array_equal(first.attend(q, counts), second.attend(q, counts))


def test_requests_may_share_blocks():
    paged = paged_on(launcher_of(), (90, 90), G=2, D=16)
    paged.tables[1] = paged.tables[0]
    q = queries(20, 4, 16)
    both = np.concatenate((q, q))
    got = paged.attend(both, (20, 20))
    assert np.array_equal(got[:20], got[20:])
    close(got[:20], paged.want(q, (20, 0)), 3e-6)


def test_scratch_that_holds_nan_and_other_shapes_changes_no_bit():
    launcher = launcher_of()
    paged = paged_on(launcher, (70, 50, 31), G=1, D=16)
    q = queries(23, 2, 16)
    want = paged.attend(q, (1, 2, 20))
    scratch = list(launcher._scratch.values())
    assert scratch
    for one in scratch:
        one.fill_(torch.nan)
    assert np.array_equal(paged.attend(q, (1, 2, 20)), want)
    paged.attend(q[:2], (1, 1, 0))
    assert np.array_equal(paged.attend(q, (1, 2, 20)), want)


@pytest.mark.parametrize("count", (1, 2, 3, 25))
@pytest.mark.parametrize("window", (0, 50))
def test_neighbours_change_no_bit(count, window):
    q = queries(count, 4, 16)
    alone = paged_on(launcher_of(), (150,), G=2, D=16)
    want = alone.attend(q, (count,), window=window)
    more = np.concatenate((queries(9, 4, 16, 3), q, queries(3, 4, 16, 4)))
    many = paged_on(launcher_of(), (33, 150, 60, 200), G=2, D=16, order=5)
    slots = many.tables[1, np.arange(150) // 16] * 16 + np.arange(150) % 16
    many.write(alone.k[0], alone.v[0], slots)
    got = many.attend(more, (9, count, 1, 1), window=window)
    assert np.array_equal(got[9 : 9 + count], want)
    assert (got[9 + count + 2 :] == 0).all()


@pytest.mark.parametrize("window", (0, 40))
def test_rows_to_verify_have_the_bits_of_rows_one_by_one(exact_products, window):
    """A step of speculation is a step of decoding: 8 rows of 2 heads are one tile."""
    paged = paged_on(launcher_of(), (70,), G=2, D=16)
    q = queries(8, 4, 16)
    together = paged.attend(q, (8,), sinks=SINKS, window=window)
    close(together, paged.want(q, (8,), SINKS, window), 3e-6)
    for i in range(8):
        one = paged.attend(q[i : i + 1], (1,), (63 + i,), sinks=SINKS, window=window)
        assert np.array_equal(one, together[i : i + 1])


@pytest.mark.parametrize("window", (0, 30))
def test_where_a_chunk_is_cut_changes_no_bit_of_what_one_kernel_does(exact_products, window):
    """Chunks of up to 8 rows are decoded: rounded otherwise, but by less than counts."""
    paged = paged_on(launcher_of(), (47,), G=1, D=16)
    q = queries(47, 2, 16)
    whole = paged.attend(q, (47,), window=window)
    close(whole, paged.want(q, (47,), window=window), 3e-6)
    for chunk, num_same in ((7, 0), (9, 45), (33, 47)):
        ends = [min(i + chunk, 47) for i in range(0, 47, chunk)]
        rows = [q[i : i + chunk] for i in range(0, 47, chunk)]
        parts = [
            paged.attend(one, (len(one),), (end,), window=window)
            for one, end in zip(rows, ends, strict=True)
        ]
        got = np.concatenate(parts)
        close(got, whole, 3e-6)
        assert np.array_equal(got[:num_same], whole[:num_same])


def test_however_many_splits_there_are_the_sum_is_the_same():
    """Of one, of three of which the last is one position, and so many that they are summed in several rounds."""
    q = queries(3, 4, 16)
    for split in (16, 192, 400):
        paged = paged_on(launcher_of(Config({"BLOCK_N": 16, "SPLIT": split})), (385, 5), G=1, D=16)
        want = paged.want(q, (2, 1), SINKS)
        close(paged.attend(q, (2, 1), sinks=SINKS), want, 3e-6)


def test_a_batch_of_more_requests_than_are_looked_up_at_once():
    """Chunks among rows that are decoded, and requests without rows."""
    counts = [0 if b % 5 == 4 else 1 for b in range(133)]
    counts[3], counts[130] = 17, 20
    lengths = [20 if count > 1 else 2 for count in counts]
    paged = paged_on(launcher_of(), lengths, G=1, D=8, S=4)
    q = queries(sum(counts), 1, 8)
    close(paged.attend(q, counts), paged.want(q, counts), 3e-6)


def test_rows_of_nobody_are_zero_if_there_are_no_requests():
    paged = paged_on(Launcher("cpu"), (), G=2, D=16)
    assert (paged.attend(queries(20, 4, 16), ()) == 0).all()


def test_requests_without_context_are_passed_over():
    paged = paged_on(Launcher("cpu"), (20, 20, 20), G=2, D=16)
    got = paged.attend(queries(21, 4, 16), (0, 20, 1), (0, 20, 20))
    close(got, paged.want(queries(21, 4, 16), (0, 20, 1)), 3e-6)


def test_what_it_cannot_do_it_refuses():
    paged = paged_on(Launcher("cpu"), (5,), G=1, D=10, dtype=DType.FP32)
    paged.cache = torch.zeros((1, 2, 1, 16, 14), dtype=torch.int8)
    with pytest.raises(ValueError, match="multiple of 4"):
        paged.attend(queries(1, 1, 10), (1,))
    wide = paged_on(Launcher("cpu"), (5,), G=1, D=257)
    with pytest.raises(ValueError, match="at most 256"):
        wide.attend(queries(1, 1, 257), (1,))


@pytest.mark.parametrize("is_fp32", (False, True))
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_a_split_is_a_number_of_whole_tiles(is_fp32, head_dim):
    """So that a sweep begins where a tile does."""
    for config in (*tiles.DECODE, tiles.decode(is_fp32, head_dim)):
        assert config.tiles["SPLIT"] % config.tiles["BLOCK_N"] == 0
