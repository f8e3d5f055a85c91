"""Attention with windows, soft caps and sinks: right against fp64, and nothing left of a window is read."""

import numpy as np
import pytest

from tests.kernels.arrays import BACKENDS, EVERYWHERE, close, ops_of
from tests.kernels.paged import Paged, S, queries
from vivace.kernels.attention import SPLIT_TOKENS
from vivace.kernels.backend import Backend

WINDOWS = (1, 2, 15, 16, 17, 100, 255, 256, 257, 300, 599, 600, 1000)
SINKS = np.float32([0.5, -3, 8, -np.inf])

each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda one: one.value)
everywhere = pytest.mark.parametrize("backend", EVERYWHERE, ids=lambda one: one.value)


@each_backend
@pytest.mark.parametrize("window", WINDOWS)
def test_windows_across_blocks_and_splits_and_nothing_left_of_them(backend, window):
    lengths, counts = (1, 256, 257, 600, 40), (1, 1, 3, 20, 40)
    paged = Paged(ops_of(backend, 2), lengths, G=1, D=8)
    q = queries(sum(counts), 2, 8)
    want = paged.want(q, counts, window=window)
    paged.forget(counts, window)
    close(paged.attend(q, counts, window=window), want, 3e-6)


@each_backend
@pytest.mark.parametrize("length", (31, 32, 33, 271, 272, 273))
@pytest.mark.parametrize("window", (15, 16, 17))
def test_windows_that_begin_at_any_offset_of_a_block(backend, length, window):
    paged = Paged(ops_of(backend), (length,), G=2, D=16)
    for count in (1, 2, 18):
        q = queries(count, 4, 16)
        want = paged.want(q, (count,), window=window)
        close(paged.attend(q, (count,), window=window), want, 3e-6)


@each_backend
@pytest.mark.parametrize(
    ("H", "G", "D"), [(4, 2, 8), (4, 1, 16), (4, 2, 64), (8, 8, 80), (4, 4, 96), (4, 1, 128), (2, 1, 256)]
)  # fmt: skip
@pytest.mark.parametrize("window", (0, 20))
@pytest.mark.parametrize("softcap", (0.0, 1.5, 50.0))
@pytest.mark.parametrize("has_sinks", (False, True))
def test_every_combination(backend, H, G, D, window, softcap, has_sinks):
    lengths, counts = (1, 40, 300), (1, 7, 2)
    paged = Paged(ops_of(backend, 2), lengths, G=G, D=D)
    q, sinks = 3 * queries(sum(counts), H, D), np.resize(SINKS, H) if has_sinks else None
    want = paged.want(q, counts, sinks, window, softcap)
    if window:
        paged.forget(counts, window)
    close(paged.attend(q, counts, sinks=sinks, window=window, softcap=softcap), want, 4e-6)


@everywhere
def test_a_softcap_bounds_scores_that_would_decide_alone(backend):
    paged = Paged(ops_of(backend), (300,), G=1, D=8)
    q = 200 * queries(2, 2, 8)
    want = paged.want(q, (2,), softcap=2.0)
    close(paged.attend(q, (2,), softcap=2.0), want, 4e-6)
    assert np.abs(want - paged.want(q, (2,))).max() > 0.1


@everywhere
def test_a_sink_takes_what_its_logit_says_and_gives_nothing(backend):
    paged = Paged(ops_of(backend), (600,), G=1, D=8)
    q = queries(2, 2, 8)
    plain = paged.attend(q, (2,))
    absent = paged.attend(q, (2,), sinks=np.full(2, -np.inf, np.float32))
    close(absent, plain, 1e-6)
    everything = paged.attend(q, (2,), sinks=np.float32([1e4, -1e4]))
    assert (everything[:, 0] == 0).all()
    close(everything[:, 1], plain[:, 1], 1e-6)


@everywhere
def test_rows_of_nobody_are_zero_with_sinks_and_windows_too(backend):
    paged = Paged(ops_of(backend, 2), (5, 20), G=2, D=16)
    got = paged.attend(queries(6, 4, 16), (1, 2), sinks=SINKS, window=3)
    assert not np.isnan(got).any() and (got[3:] == 0).all()


@pytest.mark.parametrize("window", (0, 1, 16, 250, 257))
def test_where_a_chunk_is_cut_changes_no_bit(window):
    paged = Paged(ops_of(Backend.CPU), (300,), G=2, D=16)
    q = queries(300, 4, 16)
    attrs = {"sinks": SINKS, "window": window, "softcap": 5.0}
    whole = paged.attend(q, (300,), **attrs)
    for chunk in (1, 7, 123):
        parts = [
            paged.attend(q[i : i + chunk], (len(q[i : i + chunk]),), (min(i + chunk, 300),), **attrs)
            for i in range(0, 300, chunk)
        ]  # fmt: skip
        assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("threads", (2, 4))
def test_neighbours_threads_and_block_numbers_change_no_bit(threads):
    alone = Paged(ops_of(Backend.CPU), (290,), G=2, D=64)
    q, attrs = queries(2, 8, 64), {"sinks": np.resize(SINKS, 8), "window": 200, "softcap": 5.0}
    want = alone.attend(q, (2,), **attrs)
    moved = Paged(ops_of(Backend.CPU, threads), (290, 33, 500), G=2, D=64, order=5)
    more = np.concatenate((q, queries(20, 8, 64, seed=3)))
    slots = moved.tables[0, np.arange(290) // S] * S + np.arange(290) % S
    moved.write(alone.k[0], alone.v[0], slots)
    assert np.array_equal(moved.attend(more, (2, 5, 15), **attrs)[:2], want)


def test_a_window_wider_than_the_context_changes_no_bit():
    paged = Paged(ops_of(Backend.CPU), (300,), G=2, D=16)
    q = queries(300, 4, 16)
    plain = paged.attend(q, (300,))
    assert np.array_equal(paged.attend(q, (300,), window=300), plain)
    assert not np.array_equal(paged.attend(q, (300,), window=299), plain)


def test_splits_are_counted_from_0_whatever_the_window():
    """One value of 2^24 swallows what is added to it in fp32: the rest of its own split, and nothing else."""
    window, first = 400, 200
    paged = Paged(ops_of(Backend.CPU), (first + window,), G=1, D=8)
    v = np.ones((first + window, 1, 8), np.float32)
    v[first] = 2**24
    slots = paged.tables[0, np.arange(len(v)) // S] * S + np.arange(len(v)) % S
    paged.write(paged.k[0], v, slots)
    nothing = np.zeros((1, 1, 8), np.float32)  # every position weighs the same
    want = np.float32(2**24 + (window - (SPLIT_TOKENS - first))) / np.float32(window)
    assert (paged.attend(nothing, (1,), window=window) == want).all()
