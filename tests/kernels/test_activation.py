"""Gated activations, soft caps and sums of residuals: right against fp64, over the whole range of numbers."""

import math

import numpy as np
import pytest

from tests.kernels.arrays import EVERYWHERE, close, ops_of, out, run
from vivace.kernels.gated import ACTIVATIONS

SHAPES = ((0,), (1,), (2,), (5,), (33,), (70,), (3, 2), (0, 4), (5, 3, 2))
RANGE = np.linspace(-87, 120, 4001, dtype=np.float32)[None]

each_backend = pytest.mark.parametrize("backend", EVERYWHERE, ids=lambda one: one.value)
each_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def gated64(activation, gate, up, alpha=1.702, limit=7.0):
    """In fp64, from the definitions."""
    gate, up = gate.astype(np.float64), up.astype(np.float64)
    if activation == "clamped_swiglu":
        gate, up = np.minimum(gate, limit), np.minimum(np.maximum(up, -limit), limit)
        return gate / (1 + np.exp(-alpha * gate)) * (up + 1)
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    if activation == "gelu":
        return gate * np.vectorize(math.erfc, otypes=[float])(-gate / math.sqrt(2)) / 2 * up
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return gate * (1 + np.tanh(inner)) / 2 * up


def near(got, want, slack):
    """Each by itself, not as a share of the largest."""
    assert got.shape == want.shape
    assert (np.abs(got - want) <= 5e-7 * np.abs(want) + slack).all()


@each_backend
@each_activation
@pytest.mark.parametrize("leading", SHAPES)
@pytest.mark.parametrize("F", (1, 3, 40, 129))
def test_gated(backend, activation, leading, F):
    rng = np.random.default_rng(sum(leading) + F)
    gate_up = 4 * rng.standard_normal((*leading, 2 * F), dtype=np.float32)
    ops = ops_of(backend, 2)
    [got] = run(ops, "gated", [out(ops, *leading, F)], gate_up, activation=activation)
    gate, up = gate_up[..., :F], gate_up[..., F:]
    near(got, gated64(activation, gate, up), 3e-7 * np.abs(gate) * (np.abs(up) + 1))


@each_backend
def test_silu_is_what_gated_means_unless_told(backend):
    rng, ops = np.random.default_rng(0), ops_of(backend)
    gate_up = rng.standard_normal((7, 10), dtype=np.float32)
    [got] = run(ops, "gated", [out(ops, 7, 5)], gate_up)
    close(got, gated64("silu", gate_up[:, :5], gate_up[:, 5:]))


@each_backend
@each_activation
def test_the_gate_is_right_over_the_whole_range(backend, activation):
    """Exponential and tanh are our own polynomials."""
    ops, ones = ops_of(backend), np.ones_like(RANGE)
    [got] = run(ops, "gated", [out(ops, *RANGE.shape)], np.hstack((RANGE, ones)),
                activation=activation, alpha=1.0, limit=200.0)  # fmt: skip
    want = gated64(activation, RANGE, ones, alpha=1.0, limit=200.0)
    # 1 + erf and 1 + tanh lose their digits left of 0, as they do in every framework
    slack = 2e-7 * np.abs(RANGE) if activation.startswith("gelu") else 1e-36
    near(got, want, slack)
    [extreme] = run(ops, "gated", [out(ops, 1, 4)], np.float32([[-1e4, -200, 1e4, 0, 1, 1, 1, 1]]),
                    activation=activation, limit=1e5)  # fmt: skip
    twice = 2 if activation == "clamped_swiglu" else 1  # up + 1
    assert np.allclose(extreme, [[0, 0, 1e4 * twice, 0]], atol=1e-30)


@each_backend
@pytest.mark.parametrize(("alpha", "limit"), [(1.702, 7.0), (0.5, 2.5)])
def test_the_clamped_gate_is_clamped_where_it_should(backend, alpha, limit):
    """The gate from above only, the other from both sides."""
    ops, edge = ops_of(backend), np.float32([-100, -8, -7, -2.5, -1, 0, 1, 2.5, 2.6, 7, 8, 100])
    gate, up = (x.reshape(1, -1) for x in np.meshgrid(edge, edge))
    [got] = run(ops, "gated", [out(ops, *gate.shape)], np.hstack((gate, up)),
                activation="clamped_swiglu", alpha=alpha, limit=limit)  # fmt: skip
    want = gated64("clamped_swiglu", gate, up, alpha, limit)
    assert np.allclose(got, want, rtol=2e-6, atol=1e-30)
    assert (np.abs(got) <= limit * (limit + 1)).all()


@each_backend
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (3, 7), (2, 9001)])
@pytest.mark.parametrize("cap", (0.5, 30.0, 50.0))
def test_softcap(backend, shape, cap):
    rng, ops = np.random.default_rng(shape[1]), ops_of(backend, 2)
    x = (rng.standard_normal(shape) * 10.0 ** rng.uniform(-20, 6, shape)).astype(np.float32)
    [got] = run(ops, "softcap", [out(ops, *shape)], x, cap=cap)
    want = cap * np.tanh(x.astype(np.float64) / cap)
    near(got, want, 0)  # near 0 too


@each_backend
def test_softcap_of_what_is_not_finite_is_the_cap(backend):
    ops = ops_of(backend)
    [got] = run(ops, "softcap", [out(ops, 1, 3)], np.float32([[-np.inf, 0, np.inf]]), cap=30.0)
    assert got.tolist() == [[-30, 0, 30]]


@each_backend
@pytest.mark.parametrize("shape", [(0, 5), (1, 1), (70, 45), (3, 7, 5), (70001,)])
def test_add(backend, shape):
    rng, ops = np.random.default_rng(len(shape)), ops_of(backend, 2)
    x, residual = (rng.standard_normal(shape, dtype=np.float32) for _ in range(2))
    [got] = run(ops, "add", [out(ops, *shape)], x, residual)
    assert np.array_equal(got, x + residual)
