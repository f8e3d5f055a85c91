"""Attention: right against fp64, blind to everything that is not a row's own context."""

import numpy as np
import pytest

from tests.kernels.arrays import BACKENDS, close, ops_of
from tests.kernels.paged import Paged, S, queries
from vivace.kernels.attention import SPLIT_TOKENS
from vivace.kernels.backend import Backend

each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda one: one.value)


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
