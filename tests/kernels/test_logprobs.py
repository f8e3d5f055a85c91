"""Log-softmax of given tokens and of the best: right against fp64, ties to the lower id."""

import numpy as np
import pytest

from tests.kernels.arrays import BACKENDS, EVERYWHERE, TRITON, close, ops_of, out, run
from vivace.kernels.backend import Backend


@pytest.mark.parametrize("backend", EVERYWHERE, ids=lambda one: one.value)
@pytest.mark.parametrize("K", (0, 1, 5, 20))
def test_logprobs(backend, K):
    rng = np.random.default_rng(K)
    R, V = 9, 20
    logits = rng.integers(-3, 4, (R, V)).astype(np.float32)  # whole numbers: many ties
    tokens = rng.integers(0, V, R).astype(np.int32)
    ops = ops_of(backend, 2)
    outs = [
        out(ops, R),
        out(ops, R, dtype=np.int32),
        out(ops, R, K, dtype=np.int32),
        out(ops, R, K),
    ]
    chosen, ranks, ids, best = run(ops, "logprobs", outs, logits, tokens)
    wide = logits.astype(np.float64)
    want = wide - np.log(np.exp(wide).sum(1, keepdims=True))
    rows = np.arange(R)
    close(chosen, want[rows, tokens], 1e-6)
    assert ranks.tolist() == [1 + int((logits[r] > logits[r, tokens[r]]).sum()) for r in rows]
    assert np.array_equal(ids, np.argsort(-logits, axis=1, kind="stable")[:, :K])
    close(best, np.take_along_axis(want, ids.astype(np.int64), 1), 1e-6)


@pytest.mark.parametrize(
    ("backend", "V"),
    [
        *((backend, V) for backend in BACKENDS for V in (50_000, 151_936)),
        pytest.param(Backend.TRITON, 2100, marks=pytest.mark.triton),  # three programs a row
    ],
)
@pytest.mark.parametrize("kind", ("normal", "equal", "rising"))
def test_logprobs_of_a_large_vocabulary(backend, V, kind):
    rng = np.random.default_rng(V)
    logits = rng.standard_normal((2, V), dtype=np.float32)
    if kind != "normal":
        logits[:] = 0 if kind == "equal" else np.arange(V) / 1000
    ops, tokens = ops_of(backend, 2), np.int32([0, V - 1])
    outs = [out(ops, 2), out(ops, 2, dtype=np.int32)]
    outs += [out(ops, 2, 20, dtype=np.int32), out(ops, 2, 20)]
    chosen, ranks, ids, best = run(ops, "logprobs", outs, logits, tokens)
    wide = logits.astype(np.float64)
    want = wide - wide.max(1, keepdims=True)
    want -= np.log(np.exp(want).sum(1, keepdims=True))
    close(chosen, want[[0, 1], tokens], 1e-6)
    assert ranks.tolist() == [
        1 + int((row > row[token]).sum()) for row, token in zip(logits, tokens, strict=True)
    ]
    assert np.array_equal(ids, np.argsort(-logits, axis=1, kind="stable")[:, :20])
    close(best, np.take_along_axis(want, ids.astype(np.int64), 1), 1e-6)


@pytest.mark.parametrize("backend", (Backend.CPU, TRITON), ids=("cpu", "triton"))
def test_rows_of_nan_give_ids_of_the_vocabulary(backend):
    """A broken model's logits: what comes out means nothing."""
    ops = ops_of(backend)
    logits = np.full((2, 8), np.nan, np.float32)
    outs = [
        out(ops, 2),
        out(ops, 2, dtype=np.int32),
        out(ops, 2, 3, dtype=np.int32),
        out(ops, 2, 3),
    ]
    _, _, ids, _ = run(ops, "logprobs", outs, logits, np.int32([0, 1]))
    assert ((ids >= 0) & (ids < 8)).all()


@pytest.mark.parametrize("backend", EVERYWHERE, ids=lambda one: one.value)
def test_a_row_in_a_batch_is_the_row_alone(backend):
    rng, ops = np.random.default_rng(3), ops_of(backend)
    logits = rng.standard_normal((3, 40)).astype(np.float32)
    tokens = rng.integers(0, 40, 3).astype(np.int32)

    def of(part):
        R = len(tokens[part])
        ints, floats = (out(ops, R, dtype=np.int32), out(ops, R, 4, dtype=np.int32)), out(ops, R, 4)
        return run(ops, "logprobs", [out(ops, R), *ints, floats], logits[part], tokens[part])

    whole = of(slice(0, 3))
    for r in range(3):
        alone = of(slice(r, r + 1))
        assert all(np.array_equal(a[0], b[r]) for a, b in zip(alone, whole, strict=True))
