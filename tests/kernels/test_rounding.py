"""Rounding in C++, row by row, gives the bytes of rounding in NumPy and packing the whole."""

import numpy as np
import pytest

from vivace.kernels.cpu.library import Library
from vivace.kernels.memory.cpu import CpuMemory
from vivace.kernels.quantized import packed_bytes, quantize_int4, quantize_int8

LIBRARY = Library(threads=1)
MEMORY = CpuMemory(LIBRARY)
SHAPES = [(1, 1), (5, 3), (31, 129), (32, 4), (33, 172), (64, 896), (70, 1031), (2, 65536)]
GROUPS = [None, 32, 64, 128]


def awkward(N, K, seed=0):
    """All magnitudes, numbers between two levels, rows and groups of zeros, ties of size, signs."""
    rng = np.random.default_rng(seed)
    w = (rng.standard_normal((N, K)) * 10.0 ** rng.integers(-12, 5, (N, 1))).astype(np.float32)
    for i, row in enumerate(w):
        match i % 7:
            case 1:
                row[:] = 0
            case 2:
                row[:] = rng.integers(-8, 8, K) / 2
            case 3:
                row[:] = rng.choice(np.float32([-1, 1]), K)
            case 4:
                row[: K // 2] = 0
            case 5:
                row *= np.float32(1e-33)  # into the subnormals
    return w


def wanted(w, group):
    weight = quantize_int8(w) if group is None else quantize_int4(w, group)
    return MEMORY.pack(weight).data


def rounded(w, group, num_rows):
    out = np.zeros(packed_bytes(w.shape, group), np.uint8)
    for first in range(0, len(w), num_rows):
        assert MEMORY.round(out, w[first : first + num_rows], w.shape, group, first=first)
    return out


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bytes_are_those_of_numpy_however_the_rows_come(shape, group):
    w = awkward(*shape)
    want = wanted(w, group)
    assert len(want) == packed_bytes(shape, group) == LIBRARY.packed_bytes(*shape, group)
    for num_rows in (32, 64, 1024):
        assert np.array_equal(rounded(w, group, num_rows), want)


def test_every_fp16_scale_is_rounded_as_numpy_does():
    """The scale of a group is its only number over -8: all halves, their neighbours and middles."""
    halves = np.arange(1, 0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middles = (halves[:-1] + halves[1:]) / 2
    near = [np.nextafter(middles, np.float32(side)) for side in (0, np.inf)]
    sizes = np.concatenate([halves, middles, *near]) * 8
    w = np.concatenate([sizes, -sizes])[:, None]
    assert np.array_equal(rounded(w, 32, len(w)), wanted(w, 32))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("at", [0, 128, 171])
def test_a_number_that_is_none_is_told(group, bad, at):
    w = awkward(3, 172)
    w[2, at] = bad
    out = np.zeros(packed_bytes(w.shape, group), np.uint8)
    assert not MEMORY.round(out, w, w.shape, group, first=0)


def test_a_scale_that_fp16_does_not_hold_is_told():
    w = np.full((1, 32), 8 * 65520, np.float32)
    assert not MEMORY.round(np.zeros(packed_bytes((1, 32), 32), np.uint8), w, (1, 32), 32, first=0)
    w[:] = 8 * 65519
    assert MEMORY.round(np.zeros(packed_bytes((1, 32), 32), np.uint8), w, (1, 32), 32, first=0)
