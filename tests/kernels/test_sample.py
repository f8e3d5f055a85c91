"""Sampling: the distribution is the one asked for, the draw depends on the row alone, and backends draw the same."""

import json

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor

from tests.kernels.arrays import BACKENDS, EVERYWHERE, ISAS, TRITON, close, ops_of, out, run
from vivace.kernels.backend import Backend
from vivace.kernels.gpu.launcher import Config, Launcher
from vivace.kernels.sample import triton as kernels

each_backend = pytest.mark.parametrize("backend", EVERYWHERE, ids=lambda one: one.value)
MASK = 2**64 - 1


def sample(
    ops,
    logits,
    *,
    temperature=1.0,
    top_k=0,
    top_p=1.0,
    min_p=0.0,
    seeds=None,
    positions=None,
    repetition=1.0,
    frequency=0.0,
    presence=0.0,
    penalized=(),
    bias=(),
):
    """Tokens and scores. `penalized` is (row, token, count), `bias` (row, token, value), both in row order."""
    logits = np.atleast_2d(np.float32(logits))
    R, V = logits.shape

    def column(value, dtype):
        return np.broadcast_to(np.array(value, dtype), (R,)).copy()

    def lists(entries, dtype):
        rows = np.bincount([row for row, _, _ in entries], minlength=R)
        starts = np.concatenate(([0], np.cumsum(rows))).astype(np.int32)
        ids = np.int32([token for _, token, _ in entries])
        return starts, ids, np.array([value for _, _, value in entries], dtype)

    return run(
        ops,
        "sample",
        [out(ops, R, dtype=np.int32), out(ops, R, V)],
        logits,
        column(temperature, np.float32),
        column(top_k, np.int32),
        column(top_p, np.float32),
        column(min_p, np.float32),
        np.arange(R, dtype=np.int64) if seeds is None else column(seeds, np.int64),
        column(5 if positions is None else positions, np.int32),
        column(repetition, np.float32),
        column(frequency, np.float32),
        column(presence, np.float32),
        *lists(penalized, np.int32),
        *lists(bias, np.float32),
    )


def allowed(scores):
    return [np.flatnonzero(np.isfinite(row)).tolist() for row in scores]


def mix(z):
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


def gumbel(seed, position, token):
    """The contract's words, in Python's integers."""
    stream = mix((seed + position * 0x9E3779B97F4A7C15) & MASK)
    x = mix((stream + token * 0xD1B54A32D192ED03) & MASK)
    return -np.log(-np.log(((x >> 11) + 0.5) * 2.0**-53))


@each_backend
def test_temperature_0_takes_the_best_and_ties_go_to_the_lower_id(backend):
    tokens, scores = sample(
        ops_of(backend), [[1, 3, 3, 2], [0, 0, 0, 0], [-1, -2, -1, -9]], temperature=0
    )
    assert tokens.tolist() == [1, 0, 0]
    assert np.isfinite(scores).all()


@each_backend
@pytest.mark.parametrize(
    ("k", "want"),
    [(1, [3]), (2, [1, 3]), (3, [1, 2, 3]), (0, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])],
)
def test_top_k_keeps_the_k_best_and_of_equals_the_lower_ids(backend, k, want):
    _, scores = sample(ops_of(backend), [0, 2, 2, 5, 2], top_k=k)
    assert allowed(scores) == [want]


@each_backend
@pytest.mark.parametrize(
    ("p", "want"),
    [
        (0.5, [0]),
        (0.51, [0, 1]),
        (0.75, [0, 1]),
        (0.76, [0, 1, 2]),
        (1e-6, [0]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_top_p_keeps_the_shortest_run_that_reaches_p(backend, p, want):
    logits = np.log(np.float32([0.5, 0.25, 0.125, 0.0625, 0.0625]))
    _, scores = sample(ops_of(backend), logits, top_p=p - 1e-7 if p in (0.5, 0.75) else p)
    assert allowed(scores) == [want]


@each_backend
@pytest.mark.parametrize(("p", "count"), [(0.1, 1), (0.125, 1), (0.3, 3), (0.5, 4), (0.875, 7)])
def test_top_p_keeps_of_equals_the_lower_ids(backend, p, count):
    """Eighths add up exactly, so a p that they reach exactly needs not one more."""
    _, scores = sample(ops_of(backend), np.zeros(8), top_p=p)
    assert allowed(scores) == [list(range(count))]


@each_backend
@pytest.mark.parametrize("settings", [{"top_k": 4}, {"top_p": 0.9}, {"min_p": 0.1}])
def test_a_forbidden_token_is_never_kept(backend, settings):
    """Even where the filter would keep more tokens than are left."""
    bias = [(0, token, -np.inf) for token in (0, 1, 4)]
    tokens, scores = sample(ops_of(backend), np.zeros(5), bias=bias, **settings)
    assert allowed(scores) == [[2, 3]] and tokens[0] in (2, 3)


@each_backend
@pytest.mark.parametrize(("p", "want"), [(0.0, [0, 1, 2]), (0.2, [0, 1]), (0.6, [0]), (1.0, [0])])
def test_min_p_drops_those_under_a_share_of_the_best(backend, p, want):
    _, scores = sample(ops_of(backend), np.log(np.float32([0.6, 0.3, 0.1])), min_p=p)
    assert allowed(scores) == [want]


@each_backend
def test_a_bias_counts_before_everything_and_may_forbid(backend):
    ops = ops_of(backend)
    bias = [(0, 1, -np.inf), (2, 0, 4.0), (2, 2, -1.0)]
    tokens, scores = sample(ops, [[1, 9, 2]] * 3, temperature=0, bias=bias)
    assert tokens.tolist() == [2, 1, 1]
    assert scores[2].tolist() == [5, 9, 1] and np.isneginf(scores[0, 1])
    tokens, scores = sample(ops, [[1, 9, 2]] * 3, top_k=1, bias=bias)
    assert tokens.tolist() == [2, 1, 1]


@each_backend
def test_penalties_are_those_of_transformers_and_openai(backend):
    """Repetition by transformers' own processor; mu - count * frequency - (count > 0) * presence, in fp64."""
    rng = np.random.default_rng(6)
    R, V = 8, 60
    logits = (4 * rng.standard_normal((R, V))).astype(np.float32)
    prompts = rng.integers(0, V, (R, 20))
    replies = rng.integers(0, V, (R, 30))
    repetition = rng.uniform(0.5, 2, R).astype(np.float32)
    frequency, presence = rng.uniform(-2, 2, (2, R)).astype(np.float32)
    counts = np.stack([np.bincount(reply, minlength=V) for reply in replies])
    known = np.concatenate((prompts, replies), axis=1)
    penalized = [(r, v, counts[r, v]) for r in range(R) for v in np.unique(known[r])]
    _, scores = sample(
        ops_of(backend),
        logits,
        repetition=repetition,
        frequency=frequency,
        presence=presence,
        penalized=penalized,
    )
    for r in range(R):
        processor = RepetitionPenaltyLogitsProcessor(float(repetition[r]))
        want = processor(torch.tensor(known[r : r + 1]), torch.tensor(logits[r : r + 1]))[0]
        want = want.double().numpy() - counts[r] * np.float64(frequency[r])
        close(scores[r], want - (counts[r] > 0) * np.float64(presence[r]), 1e-6)


@each_backend
def test_penalties_come_before_the_bias_and_reach_greedy_rows(backend):
    settings = {"penalized": [(0, 0, 2), (0, 1, 0)], "bias": [(0, 0, 0.5), (0, 2, 1.0)]}
    tokens, scores = sample(
        ops_of(backend),
        [[8, 4, -1], [8, 4, -1]],
        temperature=[0, 2],
        repetition=2.0,
        frequency=1.5,
        presence=0.25,
        **settings,
    )
    assert scores[0].tolist() == [8 / 2 - 2 * 1.5 - 0.25 + 0.5, 2, 0]
    assert scores[1].tolist() == [4, 2, -0.5]  # no entry, no penalty
    assert tokens[0] == 1


@each_backend
@pytest.mark.parametrize("repetition", [0.001, 10.0])
def test_penalties_make_no_nan_of_zeros_and_infinities(backend, repetition):
    penalized = [(0, token, 3) for token in range(4)]
    settings = {"repetition": repetition, "frequency": -2.0, "presence": -2.0}
    logits = [0.0, -0.0, -np.inf, 1.0]
    _, scores = sample(ops_of(backend), logits, penalized=penalized, **settings)
    assert scores[0].tolist() == pytest.approx([8, 8, -np.inf, 1 / repetition + 8])


@each_backend
@pytest.mark.parametrize(
    "settings",
    [{}, {"temperature": 0}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {"temperature": 0.001}],
)
def test_a_row_of_which_all_is_forbidden_gives_token_0(backend, settings):
    """Between two that are well: they are drawn as if alone."""
    logits = np.random.default_rng(7).standard_normal((3, 5)).astype(np.float32)
    bias = [(1, token, -np.inf) for token in range(5)]
    ops = ops_of(backend)
    tokens, scores = sample(ops, logits, seeds=3, bias=bias, **settings)
    assert tokens[1] == 0 and np.isneginf(scores[1]).all()
    for r in (0, 2):
        assert sample(ops, logits[r], seeds=3, **settings)[0] == tokens[r]


FP32 = st.floats(-100, 100, width=32)


@st.composite
def adjusted_rows(draw):
    """Logits with many ties and some -inf; any penalties and biases on them."""
    R, V = draw(st.integers(1, 4)), draw(st.integers(1, 12))
    logit = st.sampled_from([-np.inf, -3.0, -0.0, 0.0, 0.5, 3.0]) | FP32
    row = st.lists(logit, min_size=V, max_size=V)
    rows, token = st.integers(0, R - 1), st.integers(0, V - 1)
    pairs = st.sets(st.tuples(rows, token), max_size=20).map(sorted)
    penalized = [(*pair, draw(st.integers(0, 3000))) for pair in draw(pairs)]
    bias = [(*pair, draw(st.just(-np.inf) | FP32)) for pair in draw(pairs)]
    column = {
        "temperature": st.just(0.0) | st.floats(0.001, 2),
        "top_k": st.integers(0, V + 1),
        "repetition": st.floats(0.001, 10),
        "frequency": st.floats(-2, 2),
        "presence": st.floats(-2, 2),
        "seeds": st.integers(-(2**63), 2**63 - 1),
    }
    columns = {name: draw(st.lists(one, min_size=R, max_size=R)) for name, one in column.items()}
    logits = draw(st.lists(row, min_size=R, max_size=R))
    return logits, columns | {"penalized": penalized, "bias": bias}


def same_as_reference(backends, logits, settings):
    """Tokens and scores, to the last bit."""
    want, scores = sample(ops_of(Backend.REFERENCE), logits, **settings)
    for backend in backends:
        got, ours = sample(ops_of(backend, 2), logits, **settings)
        assert np.array_equal(got, want)
        assert np.array_equal(ours, scores)
        assert not np.isnan(ours).any()


@given(adjusted_rows())
def test_both_backends_adjust_to_the_last_bit(case):
    same_as_reference(ISAS, *case)


@pytest.mark.triton
@hypothesis.settings(max_examples=15)
@given(adjusted_rows())
def test_triton_adjusts_to_the_last_bit(case):
    same_as_reference([Backend.TRITON], *case)


@each_backend
def test_the_scores_are_the_distribution_that_was_asked_for(backend):
    """Against an oracle in fp64 that sorts."""
    rng, R = np.random.default_rng(1), 10 if backend is Backend.TRITON else 40
    logits = (3 * rng.standard_normal((R, 50))).astype(np.float32)
    temperature = rng.uniform(0.3, 2, R).astype(np.float32)
    top_k, top_p = rng.integers(0, 50, R), rng.uniform(0.2, 1, R).astype(np.float32)
    min_p = (rng.uniform(0, 0.2, R) * rng.integers(0, 2, R)).astype(np.float32)
    _, scores = sample(
        ops_of(backend), logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p
    )
    for r in range(R):
        scaled = logits[r] / temperature[r]
        order = np.argsort(-scaled, kind="stable")
        order = order[: top_k[r] or None]
        p = np.exp(scaled[order].astype(np.float64) - scaled.max())
        p /= p.sum()
        keep = (np.cumsum(p) - p < top_p[r]) & (p >= min_p[r] * p[0])
        assert allowed(scores)[r] == sorted(order[keep])
        close(scores[r][order[keep]], scaled[order[keep]], 1e-6)


@each_backend
def test_the_draw_is_the_contracts(backend):
    rng = np.random.default_rng(2)
    logits = rng.standard_normal((30, 17)).astype(np.float32)
    seeds, positions = rng.integers(-(2**63), 2**63, 30), rng.integers(0, 5000, 30)
    tokens, scores = sample(ops_of(backend), logits, seeds=seeds, positions=positions)
    for r in range(30):
        noise = [gumbel(int(seeds[r]) % 2**64, int(positions[r]), v) for v in range(17)]
        assert tokens[r] == np.argmax(scores[r].astype(np.float64) + noise)


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda one: one.value)
def test_draws_follow_the_probabilities(backend):
    probability = np.float32([0.5, 0.3, 0.15, 0.05])
    R = 20_000
    tokens, _ = sample(ops_of(backend, 2), np.tile(np.log(probability), (R, 1)))
    counts = np.bincount(tokens, minlength=4)
    chi_square = ((counts - R * probability) ** 2 / (R * probability)).sum()
    assert chi_square < 16.3  # 0.1 % of the time with 3 degrees of freedom; the seeds are fixed


@pytest.mark.parametrize(("R", "V"), [(4000, 64), (40, 20_000)])
def test_both_backends_draw_the_same_tokens_from_the_same_scores(R, V):
    rng = np.random.default_rng(3)
    logits = (2 * rng.standard_normal((R, V))).astype(np.float32)
    settings = {"temperature": 0.8, "top_k": V // 3, "top_p": 0.9, "min_p": 0.001}
    want, scores = sample(ops_of(Backend.REFERENCE), logits, **settings)
    for isa in ISAS:
        got, ours = sample(ops_of(isa, 2), logits, **settings)
        assert np.array_equal(got, want)
        assert allowed(ours) == allowed(scores)


@pytest.mark.parametrize("V", (1, 17, 4099, 40_001, 151_936))
@pytest.mark.parametrize("kind", ("peaked", "normal", "flat", "whole"))
def test_vocabularies_of_any_size_and_shape_give_the_tokens_of_the_reference(V, kind):
    """Few and many candidates for the filters, with ties (whole numbers), and draws from rows that are not filtered."""
    same_as_reference(ISAS, *rows_of_a_vocabulary(V, kind))


@pytest.mark.triton
@pytest.mark.parametrize(
    ("V", "kind"),
    [
        (1, "flat"),
        (17, "whole"),
        (4099, "peaked"),
        (4099, "whole"),
        (9001, "normal"),
        (9001, "flat"),
    ],
)
def test_vocabularies_of_any_size_and_shape_give_the_tokens_of_the_reference_in_triton(V, kind):
    """The same; past 4,096 candidates a row is searched otherwise."""
    same_as_reference([Backend.TRITON], *rows_of_a_vocabulary(V, kind))


def rows_of_a_vocabulary(V, kind):
    """Logits, and a row for each of many settings."""
    rng = np.random.default_rng(V)
    settings = [
        {}, {"top_k": 1}, {"top_k": 50}, {"top_k": 2000}, {"top_p": 0.9}, {"top_p": 0.1},
        {"top_p": 0.9999}, {"min_p": 0.05}, {"top_k": 40, "top_p": 0.9, "min_p": 0.02}, {"temperature": 0},
    ]  # fmt: skip
    columns = {
        name: [one.get(name, usual) for one in settings]
        for name, usual in (("temperature", 0.7), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))
    }
    logits = rng.standard_normal((len(settings), V), dtype=np.float32)
    scale = {"peaked": 8, "normal": 3, "flat": 0.01, "whole": 2}[kind]
    logits = np.rint(scale * logits) if kind == "whole" else np.float32(scale) * logits
    logits[:, rng.integers(0, V, V // 3)] = -np.inf
    return logits, columns


def test_neighbours_and_threads_change_no_draw():
    rng = np.random.default_rng(4)
    logits = rng.standard_normal((33, 100)).astype(np.float32)
    settings = {"temperature": 0.8, "top_p": 0.9}
    want, scores = sample(ops_of(Backend.CPU), logits, seeds=7, **settings)
    for threads in (2, 4):
        got, same = sample(ops_of(Backend.CPU, threads), logits, seeds=7, **settings)
        assert np.array_equal(got, want) and np.array_equal(same, scores)
    for r in (0, 13, 32):
        assert sample(ops_of(Backend.CPU), logits[r], seeds=7, **settings)[0] == want[r]


@pytest.mark.triton
def test_neighbours_change_no_draw_in_triton():
    """Bitwise; rows with filters and without, with few candidates and with many, side by side and alone."""
    rng, ops = np.random.default_rng(4), ops_of(Backend.TRITON)
    logits = (3 * rng.standard_normal((5, 6000))).astype(np.float32)
    columns = {
        "temperature": [0.8, 0.8, 0, 2, 1],
        "top_k": [50, 0, 0, 5000, 0],
        "top_p": [0.9, 1, 1, 0.9, 0.95],
    }
    want, scores = sample(ops, logits, seeds=7, **columns)
    for r in range(5):
        alone = {name: values[r] for name, values in columns.items()}
        got, same = sample(ops, logits[r], seeds=7, **alone)
        assert got[0] == want[r] and np.array_equal(same[0], scores[r])


@pytest.mark.triton
def test_the_order_in_which_candidates_were_gathered_changes_no_limit():
    """Where a run of the best weighs just what top-p asks for, give or take what fp64 rounds."""
    rng, launcher = np.random.default_rng(9), Launcher("cpu")
    best_first = -np.sort(rng.exponential(2, 64).astype(np.float32))[None]
    best_first[0, 0] = 0
    whole = torch.from_numpy(best_first)
    sums = np.exp(best_first[0].astype(np.float64)).cumsum()
    keys = [(int(order) << 18) + (1 << 18) - 1 - v for v, order in enumerate(orders_of(whole[0]))]
    for num_kept in range(32, 64, 3):
        found = set()
        for _ in range(4):
            limit = torch.zeros(1, dtype=torch.int64)
            gathered = torch.tensor(rng.permutation(keys))[None]
            fp32 = [torch.tensor([x]) for x in (-100.0, 1.0, 0.5, 0.0)]
            bound, temperature, top_p, min_p = fp32
            masses = [torch.tensor([x], dtype=torch.float64) for x in (0, 2 * sums[num_kept - 1])]
            ints = [torch.tensor([x], dtype=torch.int32) for x in (64, 0)]
            args = (limit, gathered, ints[0], bound, *masses, whole, temperature, ints[1], top_p, min_p, 64)  # fmt: skip
            launcher.launch(kernels._limit, (1,), args, {"CAPACITY": 64, "BITS": 18}, Config())
            found.add(int(limit))
        assert len(found) == 1 and found <= {keys[num_kept - 1], keys[num_kept]}


def orders_of(scores):
    """Whole numbers that compare as these do, all under 0 but the first."""
    bits = scores.view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).tolist()


@pytest.mark.triton
def test_a_vocabulary_of_the_usual_size_gives_the_tokens_of_the_reference_in_triton():
    """A top-k with a top-p, no filter, and a top-p alone of a peaked row, each spread over 149 programs."""
    logits = np.random.default_rng(8).standard_normal((3, 151_936), dtype=np.float32)
    logits *= np.float32([[3], [3], [8]])
    columns = {"temperature": 0.7, "top_k": [50, 0, 0], "top_p": [0.9, 1, 0.95]}
    same_as_reference([Backend.TRITON], logits, columns)


@each_backend
def test_no_rows_no_tokens(backend):
    tokens, _ = sample(ops_of(backend), np.zeros((0, 5)), seeds=1)
    assert tokens.shape == (0,)


@each_backend
def test_published_vectors(backend, shared_data):
    """What another engine's tests say top-k, top-p and min-p keep. Its top-p of 0 is an error here."""
    path = shared_data / "conformance" / "llamacpp" / "sampling_vectors.json"
    vectors = [
        one
        for one in json.loads(path.read_text())["vectors"]
        if one["op"] in ("top_k", "top_p", "min_p") and (one["op"], one["param"]) != ("top_p", 0)
    ]
    assert len(vectors) == 15
    for one in vectors:
        logits = np.log(np.float32(one["probs"]))
        _, scores = sample(ops_of(backend), logits, **{one["op"]: one["param"]})
        kept = sorted((one["probs"][i] for i in allowed(scores)[0]), reverse=True)
        close(np.array(kept) / sum(kept), np.array(one["expected"]) / sum(one["expected"]))


@pytest.mark.parametrize("backend", (Backend.CPU, TRITON), ids=("cpu", "triton"))
def test_rows_of_nan_give_some_token_and_touch_no_other_memory(backend):
    """A broken model's logits: what comes out means nothing, but ids stay in the vocabulary."""
    ops = ops_of(backend)
    logits = np.full((2, 8), np.nan, np.float32)
    for settings in ({"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}):
        tokens, _ = sample(ops, logits, **settings)
        assert ((tokens >= 0) & (tokens < 8)).all()
