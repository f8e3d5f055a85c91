"""Experts: chosen, applied and joined as the formulas say in fp64; ties, crowds and empty experts included."""

import itertools

import numpy as np
import pytest

from tests.kernels.arrays import BACKENDS, EVERYWHERE, TRITON, close, ops_of, out, run
from vivace.kernels.backend import Backend

each_backend = pytest.mark.parametrize("backend", EVERYWHERE, ids=lambda one: one.value)
INTERPRETED = pytest.param(Backend.TRITON, 3, marks=pytest.mark.triton)  # 3 tokens are enough
KINDS = tuple(itertools.product(("softmax", "sigmoid"), (False, True)))
GROUPS = [(16, 4, 1), (16, 4, 2), (16, 4, 4), (16, 16, 8), (60, 3, 2), (64, 8, 3), (3, 3, 1), (8, 1, 1)]  # fmt: skip


def backend_and(name, sizes):
    """Every backend with every number of tokens; Triton, which is interpreted, with few."""
    cases = [(backend, size) for backend in BACKENDS for size in sizes]
    return pytest.mark.parametrize(("backend", name), [*cases, INTERPRETED])


def normal(rng, *shape):
    return rng.standard_normal(shape, dtype=np.float32)


def route(ops, logits, K, bias=None, loads=None, *, scoring="softmax", renormalize=False, **attrs):
    """Weights and experts."""
    outs = [out(ops, len(logits), K), out(ops, len(logits), K, dtype=np.int32)]
    attrs |= {"scoring": scoring, "renormalize": renormalize}
    return run(ops, "moe_route", outs, logits, loads, bias, **attrs)


def wanted_route(logits, K, bias, scoring, renormalize, *, scale=1.0, num_groups=1, top_groups=1):
    """Row by row, from the contract's words."""
    weights, experts = [], []
    for row in logits.astype(np.float64):
        exp = np.exp(row - row.max())
        scores = exp / exp.sum() if scoring == "softmax" else 1 / (1 + np.exp(-row))
        ranks = row if bias is None else scores + bias
        groups = np.split(ranks, num_groups)
        counted = 1 if bias is None else 2
        worths = [sum(sorted(group, reverse=True)[:counted]) for group in groups]
        best = sorted(range(num_groups), key=lambda g: (-worths[g], g))[:top_groups]
        allowed = [e for e in range(len(row)) if e // len(groups[0]) in best]
        chosen = sorted(allowed, key=lambda e: (-ranks[e], e))[:K]
        picked = scores[chosen]
        experts.append(chosen)
        weights.append(scale * picked / (picked.sum() if renormalize else 1))
    return np.array(weights).reshape(len(logits), K), np.array(experts).reshape(len(logits), K)


@backend_and("T", (0, 1, 7, 33))
@pytest.mark.parametrize(("E", "K"), [(1, 1), (3, 2), (3, 3), (16, 1), (16, 8), (60, 4), (64, 7)])
@pytest.mark.parametrize(("scoring", "renormalize"), KINDS)
@pytest.mark.parametrize("has_bias", (False, True))
def test_route(backend, T, E, K, scoring, renormalize, has_bias):
    rng = np.random.default_rng(T + E)
    logits, bias = 3 * normal(rng, T, E), normal(rng, E) if has_bias else None
    kind = {"scoring": scoring, "renormalize": renormalize, "scale": 2.5}
    weights, experts = route(ops_of(backend, 2), logits, K, bias, **kind)
    want, chosen = wanted_route(logits, K, bias, **kind)
    assert np.array_equal(experts, chosen)
    assert np.allclose(weights, want, rtol=1e-6, atol=0)


@backend_and("T", (40,))
@pytest.mark.parametrize(("E", "num_groups", "top_groups"), GROUPS)
@pytest.mark.parametrize("scoring", ("softmax", "sigmoid"))
@pytest.mark.parametrize("has_bias", (False, True))
def test_only_experts_of_the_best_groups_are_chosen(
    backend, T, E, num_groups, top_groups, scoring, has_bias
):
    rng = np.random.default_rng(E + num_groups)
    logits, bias = 2 * normal(rng, T, E), normal(rng, E) if has_bias else None
    groups = {"num_groups": num_groups, "top_groups": top_groups}
    for K in {1, min(4, top_groups * (E // num_groups)), min(8, top_groups * (E // num_groups))}:
        kind = {"scoring": scoring, "renormalize": K > 1, **groups}
        weights, experts = route(ops_of(backend), logits, K, bias, **kind)
        want, chosen = wanted_route(logits, K, bias, **kind)
        assert np.array_equal(experts, chosen)
        assert np.allclose(weights, want, rtol=1e-6, atol=0)


@each_backend
@pytest.mark.parametrize("E", (3, 16, 61))
@pytest.mark.parametrize(("scoring", "renormalize"), KINDS)
@pytest.mark.parametrize("has_bias", (False, True))
def test_ties_go_to_the_lower_expert(backend, E, scoring, renormalize, has_bias):
    kind = {"scoring": scoring, "renormalize": renormalize}
    bias = np.full(E, 0.25, np.float32) if has_bias else None
    for logit in (0.0, 1.7, -3.3):
        _, experts = route(ops_of(backend), np.full((2, E), logit, np.float32), 3, bias, **kind)
        assert experts.tolist() == [[0, 1, 2]] * 2
    logits = np.float32([[-0.0, 0.0, -0.0] + [-1] * (E - 3), [0.3, 0.7, 0.7] + [0.3] * (E - 3)])
    _, experts = route(ops_of(backend), logits, 3, bias, **kind)
    assert experts.tolist() == [[0, 1, 2], [1, 2, 0]]


@each_backend
@pytest.mark.parametrize("has_bias", (False, True))
def test_ties_between_groups_go_to_the_lower_group(backend, has_bias):
    bias = np.zeros(8, np.float32) if has_bias else None
    logits = np.float32([[0, 1, 2, 0, 1, 2, 2, 1], [0] * 8])
    _, experts = route(
        ops_of(backend), logits, 2, bias, scoring="sigmoid", num_groups=4, top_groups=1
    )
    assert experts.tolist() == [[5, 4] if has_bias else [2, 3], [0, 1]]
    _, experts = route(
        ops_of(backend), logits, 3, bias, scoring="sigmoid", num_groups=4, top_groups=2
    )
    assert experts.tolist() == [[5, 6, 4] if has_bias else [2, 5, 4], [0, 1, 2]]


@each_backend
def test_a_bias_chooses_and_does_not_weigh(backend):
    logits = np.float32([[3, 2, 1, 0]])
    bias = np.float32([0, 0, 0, 5])
    for scoring in ("softmax", "sigmoid"):
        weights, experts = route(ops_of(backend), logits, 2, bias, scoring=scoring)
        scores = np.exp([0.0, 3.0]) / np.exp(logits[0].astype(np.float64)).sum()
        if scoring == "sigmoid":
            scores = 1 / (1 + np.exp([-0.0, -3.0]))
        assert experts.tolist() == [[3, 0]]
        assert np.allclose(weights, [scores], rtol=1e-6)


@each_backend
def test_without_a_bias_scores_that_round_to_the_same_do_not_tie(backend):
    """Ranking is by logit: sigmoid(30) and sigmoid(40) are both 1 in fp32."""
    _, experts = route(ops_of(backend), np.float32([[20, 30, 40, 25]]), 4, scoring="sigmoid")
    assert experts.tolist() == [[2, 1, 3, 0]]


@each_backend
@pytest.mark.parametrize("has_bias", (False, True))
def test_a_group_that_is_out_lends_no_expert_even_to_fill_up(backend, has_bias):
    low = -np.inf
    bias = np.float32([0, low, low, low, 0, 0, 0, 0]) if has_bias else None
    logits = np.float32([[9, low, low, low, 1, 1, 1, 1], [1, 1, 1, 1, 9, low, low, low]])
    # with the bias a group is worth its two best: the first -inf
    want = [[4, 5, 6], [4, 5, 6]] if has_bias else [[0, 1, 2], [4, 5, 6]]
    groups = {"num_groups": 2, "top_groups": 1}
    _, experts = route(ops_of(backend), logits, 3, bias, scoring="sigmoid", **groups)
    assert experts.tolist() == want


@each_backend
@pytest.mark.parametrize(("scoring", "renormalize"), KINDS)
def test_weights_of_extreme_logits_are_finite(backend, scoring, renormalize):
    logits = np.float32([[-200, -300, -250, -201], [1e4, -1e4, 88, 3e38]])
    weights, experts = route(ops_of(backend), logits, 2, scoring=scoring, renormalize=renormalize)
    assert experts.tolist() == [[0, 3], [3, 0]]
    assert np.isfinite(weights).all() and (weights >= 0).all()


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # the interpreter's maximum
@pytest.mark.parametrize("backend", (Backend.CPU, TRITON))
def test_logits_that_are_not_numbers_still_choose_experts_that_exist(backend):
    logits = np.full((1, 16), np.nan, np.float32)
    for bias in (None, np.zeros(16, np.float32)):
        groups = {"num_groups": 4, "top_groups": 2}
        _, experts = route(ops_of(backend), logits, 8, bias, scoring="sigmoid", **groups)
        assert sorted(set(experts[0].tolist())) == sorted(experts[0].tolist())
        assert ((experts >= 0) & (experts < 16)).all()


@each_backend
def test_tokens_that_chose_an_expert_are_counted(backend):
    """On top of what was counted before."""
    rng, ops = np.random.default_rng(2), ops_of(backend, 3)
    before = np.arange(60, dtype=np.int64) << 33
    loads, total = ops.memory.upload(before.copy()), before.copy()
    for T in (70, 0, 1):
        logits = ops.memory.upload(normal(rng, T, 60))
        outs = out(ops, T, 4), out(ops, T, 4, dtype=np.int32)
        ops.moe_route(*outs, logits, loads, scoring="softmax", renormalize=True)
        total += np.bincount(ops.memory.read(outs[1]).ravel(), minlength=60)
        assert np.array_equal(ops.memory.read(loads), total)


@each_backend
def test_as_many_experts_as_there_are_can_be_chosen_each_once(backend):
    logits = normal(np.random.default_rng(3), 3, 257)
    _, experts = route(ops_of(backend), logits, 16)
    assert np.array_equal(experts, np.argsort(-logits, axis=1, kind="stable")[:, :16])
    _, experts = route(ops_of(backend), logits[:, :5], 5)
    assert np.array_equal(np.sort(experts, axis=1), [range(5)] * 3)


@backend_and("T", (0, 1, 5, 70))
@pytest.mark.parametrize(
    ("E", "K", "N", "width"), [(1, 1, 5, 3), (3, 2, 16, 64), (16, 8, 33, 45), (60, 4, 17, 20)]
)
@pytest.mark.parametrize("has_own_rows", (False, True))
@pytest.mark.parametrize("has_bias", (False, True))
def test_expert_linear(backend, T, E, K, N, width, has_own_rows, has_bias):
    rng, ops = np.random.default_rng(T + E), ops_of(backend, 2)
    x = normal(rng, *((T, K, width) if has_own_rows else (T, width)))
    experts = rng.integers(0, E, (T, K)).astype(np.int32)
    weight, bias = normal(rng, E, N, width), normal(rng, E, N) if has_bias else None
    [got] = run(ops, "expert_linear", [out(ops, T, K, N)], x, experts, weight, bias)
    rows = (x if has_own_rows else np.repeat(x[:, None], K, axis=1)).astype(np.float64)
    want = np.einsum("tkni,tki->tkn", weight.astype(np.float64)[experts], rows)
    close(got, want + bias[experts] if has_bias else want)


@each_backend
@pytest.mark.parametrize("expert", (0, 7, 15))
def test_all_tokens_may_go_to_one_expert_and_the_others_are_not_used(backend, expert):
    rng, ops = np.random.default_rng(expert), ops_of(backend, 2)
    x, weight = normal(rng, 70, 9), np.full((16, 5, 9), np.nan, np.float32)
    weight[expert] = normal(rng, 5, 9)
    experts = np.full((70, 2), expert, np.int32)
    [got] = run(ops, "expert_linear", [out(ops, 70, 2, 5)], x, experts, weight)
    want = x.astype(np.float64) @ weight[expert].T.astype(np.float64)
    close(got, np.repeat(want[:, None], 2, axis=1))


@pytest.mark.parametrize("threads", (1, 3))
@pytest.mark.parametrize("has_bias", (False, True))
def test_an_expert_gives_the_bits_of_linear(threads, has_bias):
    """Whatever the others chose, and in whatever order."""
    rng, ops = np.random.default_rng(1), ops_of(Backend.CPU, threads)
    T, K, E, N, width = 130, 2, 3, 37, 45
    x, weight, bias = normal(rng, T, K, width), normal(rng, E, N, width), normal(rng, E, N)
    experts = rng.integers(0, E, (T, K)).astype(np.int32)
    [got] = run(ops, "expert_linear", [out(ops, T, K, N)], x, experts, weight, bias if has_bias else None)  # fmt: skip
    for t, k in ((0, 0), (0, 1), (64, 1), (129, 1), (77, 0)):
        e = experts[t, k]
        ins = (x[t, k][None], weight[e], bias[e] if has_bias else None)
        [row] = run(ops, "linear", [out(ops, 1, N)], *ins)
        assert np.array_equal(got[t, k], row[0])


@backend_and("T", (0, 1, 5, 70))
@pytest.mark.parametrize(("K", "M"), [(1, 1), (2, 45), (3, 16), (8, 33)])
@pytest.mark.parametrize("shared", ("none", "plain", "gated"))
def test_combine(backend, T, K, M, shared):
    rng, ops = np.random.default_rng(T + K), ops_of(backend, 2)
    y, weights = normal(rng, T, K, M), normal(rng, T, K)
    row = None if shared == "none" else normal(rng, T, M)
    gate = 5 * normal(rng, T, 1) if shared == "gated" else None
    [got] = run(ops, "moe_combine", [out(ops, T, M)], y, weights, row, gate)
    want = (weights.astype(np.float64)[:, :, None] * y).sum(1)
    if row is not None:
        want = want + (1 if gate is None else 1 / (1 + np.exp(-gate.astype(np.float64)))) * row
    close(got, want)


@pytest.mark.parametrize("backend", (Backend.CPU, TRITON))
def test_rows_are_joined_in_the_order_of_k(backend):
    """1 is lost beside 2^24 unless the two great ones have gone before."""
    ops = ops_of(backend)
    y = np.float32([2**24, -(2**24), 1, 2**24, 1, -(2**24)]).reshape(2, 3, 1)
    [got] = run(ops, "moe_combine", [out(ops, 2, 1)], y, np.ones((2, 3), np.float32))
    assert got.tolist() == [[1], [0]]
