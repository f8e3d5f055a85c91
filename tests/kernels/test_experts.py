"""Experts' MLPs by tiles of slots: the assignment, and products and activations that no assignment can change."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from tests.kernels.arrays import TRITON, close, ops_of, out, run
from tests.kernels.test_rows import as_bf16, widened
from vivace.kernels.backend import Backend
from vivace.kernels.gpu.launcher import Config
from vivace.kernels.moe_assign import max_tiles, tile_rows
from vivace.kernels.moe_assign import triton as assign_kernels

each_backend = pytest.mark.parametrize(
    "backend", (Backend.REFERENCE, TRITON), ids=lambda one: one.value
)
POISON = np.iinfo(np.int32).max
STORED = {"fp32": (np.float32, 2e-6), "fp16": (np.float16, 2e-3), "bf16": (as_bf16, 1e-2)}


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def choice(rng, T, E, K):
    """K distinct experts a token."""
    return np.argsort(rng.random((T, E)), axis=1)[:, :K].astype(np.int32)


def assign(ops, experts, E):
    """Order and tiles."""
    outs = [out(ops, *experts.shape, dtype=np.int32), out(ops, *experts.shape, 3, dtype=np.int32)]
    return run(ops, "moe_assign", outs, experts, num_experts=E)


def check_assignment(experts, E, order, tiles):
    """What the contract says, in other words than the reference."""
    n, rows = experts.size, tile_rows(experts.size, E)
    flat, order, tiles = experts.ravel(), order.ravel(), tiles.reshape(-1, 3)
    assert order.tolist() == sorted(range(n), key=lambda slot: (flat[slot], slot))
    used = tiles[tiles[:, 0] >= 0]
    assert np.array_equal(tiles[: len(used)], used) and len(used) <= max_tiles(n, E)
    assert (tiles[len(used) :] == (-1, 0, 0)).all()
    covered = [place for _, begin, end in used for place in range(begin, end)]
    assert covered == list(range(n))
    for (expert, begin, end), after in zip(used, [*used[1:, 0], None], strict=True):
        assert 1 <= end - begin <= rows and (flat[order[begin:end]] == expert).all()
        assert end - begin == rows or after != expert


@each_backend
@pytest.mark.parametrize(
    ("T", "E", "K"),
    [(1, 1, 1), (1, 7, 2), (8, 8, 8), (9, 7, 7), (64, 1, 1), (13, 5, 5), (40, 60, 2), (300, 3, 3)],
)
def test_slots_are_assigned(backend, T, E, K):
    experts = choice(np.random.default_rng(T), T, E, K)
    check_assignment(experts, E, *assign(ops_of(backend), experts, E))


@each_backend
def test_all_slots_may_be_of_one_expert(backend):
    for T, E in ((30, 4), (90, 6), (1100, 2)):
        for expert in (0, E - 1):
            experts = np.full((T, 1), expert, np.int32)
            check_assignment(experts, E, *assign(ops_of(backend), experts, E))


@pytest.mark.triton
def test_an_expert_may_have_more_tiles_than_are_written_at_once(monkeypatch):
    monkeypatch.setattr(assign_kernels, "COUNTED", Config({"BLOCK": 4}))
    for expert in (0, 8):
        experts = np.full((140, 1), expert, np.int32)
        check_assignment(experts, 9, *assign(ops_of(Backend.TRITON), experts, 9))


@each_backend
def test_where_hardly_two_slots_meet_nothing_is_assigned(backend):
    assert (tile_rows(2, 8), tile_rows(3, 8), max_tiles(2, 8)) == (1, 16, 2)
    order, tiles = assign(ops_of(backend), np.int32([[7, 3]]), 8)
    assert (order == np.bitwise_not(np.int32(0))).all() and (tiles == order[0, 0]).all()
    order, tiles = assign(ops_of(backend), np.zeros((0, 2), np.int32), 8)
    assert order.size == tiles.size == 0


@pytest.mark.triton
@settings(max_examples=8)
@given(
    T=st.integers(1, 60), E=st.integers(1, 9), K=st.integers(1, 3), seed=st.integers(0, 99),
    block=st.sampled_from((4, 16, 64)), is_skewed=st.booleans(),
)  # fmt: skip
def test_both_ways_of_assigning_are_one(T, E, K, seed, block, is_skewed):
    """All pairs at once, or counted by each expert in blocks that end anywhere."""
    rng = np.random.default_rng(seed)
    experts = rng.integers(0, 1 if is_skewed else E, (T, K)).astype(np.int32)
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assign_kernels, "COUNTED", Config({"BLOCK": block}))
        for most in (0, 256):
            patch.setattr(assign_kernels, "MAX_PAIRED", most)
            found.append(assign(ops_of(Backend.TRITON), experts, E))
    if tile_rows(T * K, E) > 1:
        check_assignment(experts, E, *found[0])
    assert all(np.array_equal(a, b) for a, b in zip(*found, strict=True))


def test_tiles_grow_with_the_slots_of_an_expert():
    rows = [tile_rows(n, 128) for n in (0, 8, 32, 33, 2048, 2049, 8192, 8193, 10**6)]
    assert rows == [1, 1, 1, 16, 16, 64, 64, 128, 128]


def activated(gate, up, activation, alpha=1.702, limit=7.0):
    if activation == "clamped_swiglu":
        gate, up = np.minimum(gate, limit), np.clip(up, -limit, limit) + 1
        return gate / (1 + np.exp(-alpha * gate)) * up
    if activation == "silu":
        return gate / (1 + np.exp(-gate)) * up
    if activation == "gelu":
        return gate * (1 + np.vectorize(math.erf)(gate / math.sqrt(2))) / 2 * up
    inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)
    return gate * (1 + np.tanh(inner)) / 2 * up


def gated(ops, x, experts, weight, bias=None, assignment=None, **attrs):
    order, tiles = assignment or assign(ops, experts, len(weight))
    outs = [out(ops, *experts.shape, weight.shape[1] // 2)]
    return run(ops, "expert_gated", outs, x, experts, order, tiles, weight, bias, **attrs)[0]


def down(ops, x, experts, weight, bias=None, assignment=None):
    order, tiles = assignment or assign(ops, experts, len(weight))
    outs = [out(ops, *experts.shape, weight.shape[1])]
    return run(ops, "expert_down", outs, x, experts, order, tiles, weight, bias)[0]


def product(weight, rows, experts):
    return np.einsum("tkni,tki->tkn", weight.astype(np.float64)[experts], rows.astype(np.float64))


@each_backend
@pytest.mark.parametrize(
    ("T", "E", "K", "F", "M", "stored", "activation"),
    [
        (0, 4, 2, 5, 7, "fp32", "silu"),
        (1, 17, 4, 5, 7, "fp32", "silu"),  # each slot a tile
        (1, 17, 4, 17, 33, "bf16", "gelu"),
        (5, 4, 2, 18, 40, "fp32", "clamped_swiglu"),  # tiles of 16
        (5, 4, 2, 18, 40, "fp16", "gelu_tanh"),
        (5, 4, 2, 1, 1, "bf16", "silu"),
        (35, 2, 2, 5, 7, "fp32", "gelu"),  # of 64
        (35, 2, 2, 5, 70, "bf16", "silu"),
        (140, 2, 2, 3, 7, "fp32", "gelu_tanh"),  # of 128
        (140, 2, 2, 3, 70, "fp16", "clamped_swiglu"),
    ],
)
@pytest.mark.parametrize("has_bias", (False, True))
def test_the_halves_of_an_mlp(backend, T, E, K, F, M, stored, activation, has_bias):
    rng, ops = np.random.default_rng(T + E), ops_of(backend)
    store, tolerance = STORED[stored]
    experts, x, y = choice(rng, T, E, K), normal(rng, T, M), normal(rng, T, K, M)
    weights = [store(normal(rng, E, 2 * F, M)), store(normal(rng, E, F, M))]
    biases = [normal(rng, E, 2 * F), normal(rng, E, F)] if has_bias else [None, None]
    wide = [widened(w) if stored == "bf16" else w for w in weights]
    rows = np.repeat(x[:, None], K, axis=1)
    both, single = product(wide[0], rows, experts), product(wide[1], y, experts)
    if has_bias:
        both, single = both + biases[0][experts], single + biases[1][experts]
    kind = {"activation": activation, "alpha": 1.5, "limit": 2.0}
    want = activated(both[..., :F], both[..., F:], **kind)
    close(gated(ops, x, experts, weights[0], biases[0], **kind), want, 2 * tolerance)
    close(down(ops, y, experts, weights[1], biases[1]), single, tolerance)


@each_backend
@pytest.mark.parametrize(("T", "K"), [(1, 1), (3, 2), (18, 2), (70, 2)])
def test_experts_that_nobody_chose_are_not_read(backend, T, K):
    rng, ops, E, M = np.random.default_rng(T), ops_of(backend), 4, 9
    weight, bias = np.full((E, 6, M), np.nan, np.float32), np.full((E, 6), np.nan, np.float32)
    weight[2], bias[2] = normal(rng, 6, M), normal(rng, 6)
    x, y, experts = normal(rng, T, M), normal(rng, T, K, M), np.full((T, K), 2, np.int32)
    both = x.astype(np.float64) @ weight[2].T.astype(np.float64) + bias[2]
    want = np.repeat(activated(both[:, :3], both[:, 3:], "silu")[:, None], K, axis=1)
    close(gated(ops, x, experts, weight, bias), want, 4e-6)
    close(down(ops, y, experts, weight, bias), y.astype(np.float64) @ weight[2].T + bias[2])


@each_backend
def test_without_need_an_assignment_is_not_read(backend):
    rng, ops = np.random.default_rng(1), ops_of(backend)
    x, y, experts, weight = normal(rng, 1, 9), normal(rng, 1, 2, 9), np.int32([[5, 2]]), normal(rng, 8, 6, 9)  # fmt: skip
    poison = np.full((1, 2), POISON, np.int32), np.full((1, 2, 3), POISON, np.int32)
    assert np.isfinite(gated(ops, x, experts, weight, assignment=poison)).all()
    close(down(ops, y, experts, weight, assignment=poison), product(weight, y, experts))


def dot_in_order(self, a, b, d, input_precision, max_num_imprecise_acc):
    """For the interpreter's, which is NumPy's: its bits vary with the row's place and the size of the product."""
    total = d.data.copy()
    for k in range(a.data.shape[1]):
        total += a.data[:, k, None].astype(np.float32) * b.data[k]
    return TensorHandle(total, d.dtype.scalar)


@pytest.mark.triton
@pytest.mark.parametrize("stored", STORED)
def test_a_row_in_a_batch_is_the_row_alone(stored, monkeypatch):
    """To the bit, from tiles of any size, and when it is asked for again."""
    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot_in_order)
    rng, ops, E, K, F, M = np.random.default_rng(5), ops_of(Backend.TRITON), 8, 2, 5, 150
    x, weight = normal(rng, 530, M), STORED[stored][0](normal(rng, E, 2 * F, M))
    y, experts = normal(rng, 530, K, M), choice(rng, 530, E, K)
    alone = [apply(ops, rows[:1], experts[:1], weight) for apply, rows in ((gated, x), (down, y))]
    for T in (4, 70, 530):
        assert tile_rows(T * K, E) == {4: 16, 70: 64, 530: 128}[T]
        rows = np.arange(T)
        rows[[0, T // 2]] = T // 2, 0  # not always the first
        for apply, values, want in ((gated, x, alone[0]), (down, y, alone[1])):
            got = apply(ops, values[rows], experts[rows], weight)
            assert np.array_equal(got[T // 2], want[0])
            assert np.array_equal(got, apply(ops, values[rows], experts[rows], weight))


@pytest.mark.triton
@pytest.mark.parametrize("stored", ("fp16", "bf16"))
def test_rows_are_rounded_to_the_weights_type(stored):
    ops, experts = ops_of(Backend.TRITON), np.int32([[0], [1]])
    weight = STORED[stored][0](np.ones((2, 2, 1), np.float32))
    x = np.float32([[1 + 2**-12], [1 + 2**-7 - 2**-12]])
    rounded = np.float32([[[1.0] * 2], [[1 + 2**-7] * 2]])
    assert np.array_equal(down(ops, x[:, None], experts, weight), rounded)
    want = gated(ops, rounded[:, 0, :1].copy(), experts, weight)
    assert np.array_equal(gated(ops, x, experts, weight), want)


@pytest.mark.triton
def test_weights_next_to_nothing_are_still_weights():
    """The smallest that fp16 holds, and fp32's that are not normal."""
    rng, ops = np.random.default_rng(6), ops_of(Backend.TRITON)
    experts, x = choice(rng, 5, 4, 2), normal(rng, 5, 2, 20)
    for weight in (
        (6e-8 * rng.integers(-3, 4, (4, 6, 20))).astype(np.float16),
        np.float32(1e-39) * normal(rng, 4, 6, 20),
    ):
        want = product(weight, x, experts)
        got = down(ops, x, experts, weight)
        assert np.abs(got - want).max() <= 2e-3 * np.abs(want).max() and (got != 0).any()
