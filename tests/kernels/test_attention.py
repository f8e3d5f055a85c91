"""Attention: right against fp64, blind to everything that is not a row's own context."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.arrays import BACKENDS, EVERYWHERE, ISAS, close, ops_of
from tests.kernels.paged import Paged, S, queries
from vivace.kernels.attention import SPLIT_TOKENS
from vivace.kernels.backend import Backend
from vivace.kernels.buffer import DType

each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda one: one.value)
everywhere = pytest.mark.parametrize("backend", EVERYWHERE, ids=lambda one: one.value)


@everywhere
@pytest.mark.parametrize(
    ("H", "G", "D"), [(1, 1, 8), (4, 2, 16), (8, 2, 64), (8, 1, 80), (3, 3, 10), (2, 1, 256)]
)
def test_decode_rows_and_chunks_in_one_call(backend, H, G, D):
    lengths, counts = (1, 16, 40, 17), (1, 1, 7, 17)
    paged = Paged(ops_of(backend, 2), lengths, G=G, D=D)
    q = queries(sum(counts), H, D)
    close(paged.attend(q, counts), paged.want(q, counts), 3e-6)


@everywhere
@pytest.mark.parametrize("length", (255, 256, 257, 511, 513, 600))
def test_contexts_around_the_splits(backend, length):
    paged = Paged(ops_of(backend), (length,), G=1, D=8)
    q = queries(3, 2, 8)
    close(paged.attend(q, (3,)), paged.want(q, (3,)), 3e-6)


@each_backend
@pytest.mark.parametrize(
    ("H", "G", "D"), [(5, 1, 8), (14, 2, 64), (16, 1, 24), (26, 1, 96), (3, 3, 1), (6, 2, 144)]
)
@pytest.mark.parametrize("block_tokens", (1, 3, 8, 12, 32, 48))
def test_blocks_and_heads_that_fit_no_vector(backend, H, G, D, block_tokens):
    """Their last positions and elements are read and no others: the spare blocks are NaN."""
    lengths, counts = (1, 30, 270, 13), (1, 3, 9, 13)
    paged = Paged(ops_of(backend, 2), lengths, G=G, D=D, S=block_tokens)
    q = queries(sum(counts), H, D)
    close(paged.attend(q, counts), paged.want(q, counts), 3e-6)
    want = paged.want(q, counts, window=11)
    paged.forget(counts, 11)
    close(paged.attend(q, counts, window=11), want, 3e-6)


@each_backend
@pytest.mark.parametrize("window", (0, 2049, 2500))
def test_contexts_of_several_groups_of_splits(backend, window):
    """Few of them: threads take the groups of one tile. Then so many that each tile is one thread's: the same bits."""
    lengths = (2047, 2048, 2049, 4097, 300)
    paged = Paged(ops_of(backend, 2), lengths, G=2, D=16)
    q = queries(len(lengths), 4, 16)
    counts = (1,) * len(lengths)
    want = paged.want(q, counts, window=window)
    got = paged.attend(q, counts, window=window)
    close(got, want, 3e-6)


@pytest.mark.parametrize("isa", ISAS, ids=lambda one: one.value)
@pytest.mark.parametrize("threads", (1, 2, 4))
def test_who_has_which_group_of_splits_changes_no_bit(isa, threads):
    paged = Paged(ops_of(isa, threads), (5000,), G=1, D=16)
    q = queries(100, 9, 16)
    alone = Paged(ops_of(isa), (5000,), G=1, D=16)
    many = paged.attend(q, (100,))
    assert np.array_equal(alone.attend(q, (100,)), many)
    assert np.array_equal(paged.attend(q[-1:], (1,)), many[-1:])
    assert np.array_equal(alone.attend(q[-1:], (1,)), many[-1:])


@each_backend
@pytest.mark.parametrize("dtype", (DType.BF16, DType.INT8))
@pytest.mark.parametrize(("H", "G", "D"), [(14, 2, 64), (3, 3, 10), (16, 1, 96), (5, 1, 33)])
@pytest.mark.parametrize("block_tokens", (16, 5))
@pytest.mark.parametrize("window", (0, 20))
def test_caches_of_fewer_bits(backend, dtype, H, G, D, block_tokens, window):
    """Right against fp64 over what they hold."""
    lengths, counts = (1, 40, 300, 2100), (1, 7, 2, 1)
    paged = Paged(ops_of(backend, 2), lengths, G=G, D=D, S=block_tokens, dtype=dtype)
    q = queries(sum(counts), H, D)
    want = paged.want(q, counts, window=window, softcap=5.0)
    if window:
        paged.forget(counts, window)
    close(paged.attend(q, counts, window=window, softcap=5.0), want, 4e-6)


@pytest.mark.parametrize("isa", ISAS, ids=lambda one: one.value)
@pytest.mark.parametrize("dtype", (DType.BF16, DType.INT8))
def test_chunks_and_threads_change_no_bit_of_a_cache_of_fewer_bits(isa, dtype):
    alone = Paged(ops_of(isa), (300,), G=2, D=16, dtype=dtype)
    q = queries(300, 4, 16)
    whole = alone.attend(q, (300,))
    shared = Paged(ops_of(isa, 2), (300,), G=2, D=16, dtype=dtype, order=3)
    for chunk in (1, 7, 123):
        parts = [
            shared.attend(q[i : i + chunk], (len(q[i : i + chunk]),), (min(i + chunk, 300),))
            for i in range(0, 300, chunk)
        ]
        assert np.array_equal(np.concatenate(parts), whole)


@everywhere
@pytest.mark.parametrize("dtype", (DType.FP32, DType.BF16, DType.INT8))
def test_a_number_that_is_none_stays_one(backend, dtype):
    """In a value or a score: an answer must not come of it."""
    for poisoned in (0, 1):
        paged = Paged(ops_of(backend), (20,), G=1, D=8, dtype=dtype)
        bad = [paged.k[0].copy(), paged.v[0].copy()]
        bad[poisoned][3] = np.nan
        paged.write(*bad, paged.tables[0, np.arange(20) // S] * S + np.arange(20) % S)
        assert np.isnan(paged.attend(queries(1, 2, 8), (1,))).all()


@each_backend
@settings(max_examples=40)
@given(
    requests=st.lists(st.tuples(st.integers(1, 600), st.integers(0, 9)), min_size=1, max_size=3),
    G=st.integers(1, 3),
    heads=st.integers(1, 16),
    D=st.sampled_from((8, 16, 64, 80, 96, 128, 256)) | st.integers(1, 40),
    block_tokens=st.sampled_from((16, 64)) | st.integers(1, 40),
    window=st.just(0) | st.integers(1, 600),
    softcap=st.sampled_from((0.0, 2.0, 30.0)),
    has_sinks=st.booleans(),
    dtype=st.sampled_from((DType.FP32, DType.BF16, DType.INT8)),
    seed=st.integers(0, 1000),
)
def test_no_shape_is_different(
    backend, requests, G, heads, D, block_tokens, window, softcap, has_sinks, dtype, seed
):
    """What nobody wrote and what lies left of the windows is NaN, its block numbers nonsense."""
    lengths = [length for length, _ in requests]
    counts = [min(count, length) for length, count in requests]
    paged = Paged(ops_of(backend, 2), lengths, G=G, D=D, S=block_tokens, seed=seed, dtype=dtype)
    q, rng = queries(sum(counts), G * heads, D, seed), np.random.default_rng(seed)
    sinks = rng.standard_normal(G * heads, dtype=np.float32) if has_sinks else None
    want = paged.want(q, counts, sinks, window, softcap)
    if window:
        paged.forget(counts, window)
    got = paged.attend(q, counts, sinks=sinks, window=window, softcap=softcap)
    assert got.shape == want.shape and not np.isnan(got).any()
    assert np.abs(got - want).max(initial=0) <= 2e-5  # values are about 1; scores of 256 products


@everywhere
def test_rows_of_nobody_are_zero_and_requests_without_rows_are_passed_over(backend):
    paged = Paged(ops_of(backend, 2), (5, 20, 9), G=2, D=16)
    q = queries(6, 4, 16)
    got = paged.attend(q, (1, 0, 2))
    close(got[:3], paged.want(q[:3], (1, 0, 2)), 3e-6)
    assert (got[3:] == 0).all()


@everywhere
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
