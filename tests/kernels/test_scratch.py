"""What an op finds in the memory that it borrows changes nothing: it holds NaN, or the largest number, at every call."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.gpu.op_cases import op_cases, outputs
from tests.kernels.arrays import ops_of
from tests.kernels.paged import queries
from tests.kernels.sparse import Sparse
from vivace.kernels.backend import Backend
from vivace.kernels.gpu.launcher import Launcher

pytestmark = pytest.mark.triton
CASES = [case for case in op_cases() if case.name in ("sample 5x260", "logprobs 5x260")]


@pytest.fixture
def poisoned(monkeypatch):
    """From when it is called on, borrowed memory is poisoned; what was borrowed."""
    names, lend = [], Launcher.scratch

    def lend_poisoned(self, name, shape, dtype):
        names.append(name)
        kept = lend(self, name, shape, dtype)
        return kept.fill_(float("nan") if dtype.is_floating_point else torch.iinfo(dtype).max)

    def poison():
        monkeypatch.setattr(Launcher, "scratch", lend_poisoned)
        return names

    return poison


@pytest.mark.parametrize("case", CASES, ids=lambda one: one.op)
def test_scratch_of_sampling_may_hold_anything(case, poisoned):
    ops = ops_of(Backend.TRITON)
    want = outputs(case, ops)
    names = poisoned()
    got = outputs(case, ops)
    assert names and all(np.array_equal(a, b) for a, b in zip(got, want, strict=True))


def test_scratch_of_sparse_decode_may_hold_anything(poisoned):
    sparse, q = Sparse(ops_of(Backend.TRITON), (145, 31, 160), (8, 0, 9)), queries(3, 2, 16)

    def found():
        scores = sparse.score(q)
        selection = sparse.choose(scores)
        return [scores, sparse.attend(q, selection), sparse.keep(q, selection, (1, 1, 0))]

    want = found()
    names = poisoned()
    got = found()
    assert {name.split()[0].split(".")[0] for name in names} == {
        "block_score",
        "attention",
        "kept_mass",
    }
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(got, want, strict=True))


def test_no_other_op_borrows():
    """Or it must come here too."""
    files = (Path(__file__).parents[2] / "kernels").glob("*/triton.py")
    borrowers = {path.parent.name for path in files if ".scratch(" in path.read_text()}
    assert borrowers == {"sample", "logprobs", "attention", "block_score", "kept_mass"}
