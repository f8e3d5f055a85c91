"""Every backend of the ops that go row by row agrees with fp64, on awkward shapes, and no row depends on another."""

import numpy as np
import pytest

from tests.kernels.arrays import BACKENDS, close, ops_of, out, run
from vivace.kernels.backend import Backend

ROWS = (0, 1, 2, 3, 4, 5, 7, 33, 70)  # below, at and past the tiles of rows
WIDTHS = ((1, 1), (5, 3), (16, 64), (33, 45), (130, 17))
EPS = 1e-6

each_backend = pytest.mark.parametrize("backend", BACKENDS, ids=lambda one: one.value)


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def norm64(x, weight, eps=EPS):
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


@each_backend
@pytest.mark.parametrize("T", ROWS)
@pytest.mark.parametrize(("N", "K"), WIDTHS)
def test_linear(backend, T, N, K):
    rng = np.random.default_rng(T * 1000 + N)
    ops, x, w = ops_of(backend, 2), normal(rng, T, K), normal(rng, N, K)
    [got] = run(ops, "linear", [out(ops, T, N)], x, w)
    close(got, x.astype(np.float64) @ w.T.astype(np.float64))


@each_backend
@pytest.mark.parametrize("T", ROWS)
@pytest.mark.parametrize("M", (1, 3, 16, 45, 128))
def test_norms(backend, T, M):
    rng = np.random.default_rng(T + M)
    ops, x, other, weight = ops_of(backend, 2), normal(rng, T, M), normal(rng, T, M), normal(rng, M)
    [got] = run(ops, "rmsnorm", [out(ops, T, M)], x, weight, eps=EPS)
    close(got, norm64(x, weight))
    outs = [out(ops, T, M), out(ops, T, M)]
    total, normed = run(ops, "add_rmsnorm", outs, x, other, weight, eps=EPS)
    assert np.array_equal(total, x + other)
    close(normed, norm64(total, weight))


@each_backend
def test_the_norm_is_right_over_the_whole_range_of_magnitudes(backend):
    """Its 1/sqrt is our own polynomial."""
    ops = ops_of(backend)
    x = np.outer(np.logspace(-15, 15, 301, dtype=np.float32), np.ones(4, np.float32))
    [got] = run(ops, "rmsnorm", [out(ops, 301, 4)], x, np.ones(4, np.float32), eps=1e-30)
    want = norm64(x, np.ones(4), eps=1e-30)
    assert (np.abs(got - want) <= 4e-7 * np.abs(want)).all()


@each_backend
@pytest.mark.parametrize("T", ROWS)
@pytest.mark.parametrize("F", (1, 3, 40, 129))
def test_silu_mul(backend, T, F):
    rng = np.random.default_rng(T + F)
    ops, gate_up = ops_of(backend, 2), 4 * normal(rng, T, 2 * F)
    [got] = run(ops, "silu_mul", [out(ops, T, F)], gate_up)
    gate, up = np.split(gate_up.astype(np.float64), 2, axis=1)
    close(got, gate / (1 + np.exp(-gate)) * up)


@each_backend
def test_the_gate_is_right_over_the_whole_range_of_the_exponential(backend):
    """Its exp is our own polynomial."""
    ops = ops_of(backend)
    gate = np.linspace(-87, 120, 4001, dtype=np.float32)[None]
    [got] = run(ops, "silu_mul", [out(ops, 1, 4001)], np.hstack((gate, np.ones_like(gate))))
    wide = gate.astype(np.float64)
    want = wide / (1 + np.exp(-wide))
    assert (np.abs(got - want) <= 4e-7 * np.abs(want) + 1e-36).all()
    [extreme] = run(ops, "silu_mul", [out(ops, 1, 3)], np.float32([[-1e4, -200, 1e4, 1, 1, 1]]))
    assert np.allclose(extreme, [[0, 0, 1e4]], atol=1e-30)


@each_backend
@pytest.mark.parametrize("T", (0, 1, 5, 130))
def test_embed_and_take_rows_copy_rows(backend, T):
    rng = np.random.default_rng(T)
    ops, table = ops_of(backend, 2), normal(rng, 11, 7)
    which = rng.integers(0, 11, T).astype(np.int32)
    [got] = run(ops, "embed", [out(ops, T, 7)], which, table)
    assert np.array_equal(got, table[which])
    [got] = run(ops, "take_rows", [out(ops, T, 7)], table, which)
    assert np.array_equal(got, table[which])


@each_backend
@pytest.mark.parametrize("scale", (1.0, 1.25))
def test_rope_table(backend, scale):
    ops = ops_of(backend, 2)
    positions = np.int32([0, 1, 2, 511, 2047, 131071] * 3)
    inv_freq = (1 / 10000 ** (np.arange(0, 16, 2, dtype=np.float32) / 16)).astype(np.float32)
    [got] = run(ops, "rope_table", [out(ops, 18, 16)], positions, inv_freq, scale=scale)
    angles = (positions.astype(np.float32)[:, None] * inv_freq).astype(np.float64)  # one rounding
    close(got, np.hstack((np.cos(angles), np.sin(angles))) * scale, 1e-7)


@pytest.mark.parametrize("threads", (1, 2, 4))
def test_no_row_depends_on_its_neighbours_or_the_threads(threads):
    """Bitwise, on the CPU backend: a row alone, in a small batch and in a large one."""
    rng = np.random.default_rng(0)
    alone, many = ops_of(Backend.CPU), ops_of(Backend.CPU, threads)
    x, w, weight = normal(rng, 70, 45), normal(rng, 33, 45), normal(rng, 45)
    [linear] = run(many, "linear", [out(many, 70, 33)], x, w)
    [normed] = run(many, "rmsnorm", [out(many, 70, 45)], x, weight, eps=EPS)
    gate_up = normal(rng, 70, 90)
    [gated] = run(many, "silu_mul", [out(many, 70, 45)], gate_up)
    for start, end in ((0, 1), (13, 14), (3, 10), (63, 66), (69, 70), (5, 68)):
        count = end - start
        [part] = run(alone, "linear", [out(alone, count, 33)], x[start:end], w)
        assert np.array_equal(part, linear[start:end])
        [part] = run(alone, "rmsnorm", [out(alone, count, 45)], x[start:end], weight, eps=EPS)
        assert np.array_equal(part, normed[start:end])
        [part] = run(alone, "silu_mul", [out(alone, count, 45)], gate_up[start:end])
        assert np.array_equal(part, gated[start:end])
