"""The runner: sizes from the inputs, an arena of a fixed size, and limits that hold."""

import subprocess
import sys

import numpy as np
import pytest

from tests.step_driver import make_driver, nobody_sparse
from tests.tiny_models import make_checkpoint
from vivace.engine.models.decoder import emit
from vivace.engine.models.hf_config import read_spec
from vivace.engine.models.program import Symbol
from vivace.engine.runner import MAX_BOUND, arena_bytes
from vivace.kernels.backend import Backend, load


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(params=(Backend.CPU, Backend.REFERENCE), ids=lambda backend: backend.value)
def driver(request, checkpoint):
    return make_driver(checkpoint, load(request.param), num_blocks=32, max_tokens=64)


def inputs(T=3, B=1, P=1):
    """A step of one request, or a wrong one."""
    return {
        "tokens": np.zeros(T, np.int32),
        "positions": np.arange(T, dtype=np.int32),
        "slots": np.arange(T, dtype=np.int32),
        "block_tables": np.zeros((B, -(-T // 16)), np.int32),
        "query_starts": np.array([0, T], np.int32),
        "context_lens": np.full(B, T, np.int32),
        "rows": np.full(P, T - 1, np.int32),
    } | nobody_sparse(B)


def test_a_step_past_the_limits_is_refused(driver):
    with pytest.raises(ValueError, match="tokens: 65 in a step, at most 64"):
        driver.runner.step(inputs(T=65))
    with pytest.raises(ValueError, match="rows that pass the last layer: 65 in a step, at most 64"):
        driver.runner.step(inputs(P=65))
    for num_logits in (-1, 3):
        with pytest.raises(ValueError, match=rf"num_logits must be in 0\.\.2.*got {num_logits}"):
            driver.runner.step(inputs(P=2), num_logits)


def test_inputs_that_disagree_are_refused(driver):
    with pytest.raises(ValueError, match=r"tokens \[3\]: tokens are 4 elsewhere"):
        driver.runner.step(inputs() | {"positions": np.arange(4, dtype=np.int32)})
    with pytest.raises(ValueError, match="block_tables must have 2 dimensions"):
        driver.runner.step(inputs() | {"block_tables": np.zeros(1, np.int32)})
    with pytest.raises(ValueError, match="query_starts must be"):
        driver.runner.step(inputs() | {"query_starts": np.zeros(3, np.int32)})
    with pytest.raises(ValueError, match="tokens must hold int32"):
        driver.runner.step(inputs() | {"tokens": np.zeros(3, np.int64)})


def test_a_step_may_need_no_logits(driver):
    logits, hidden = driver.runner.step(inputs(P=0))
    assert tuple(logits.shape) == (0, 260) and tuple(hidden.shape) == (0, 64)


def test_logits_are_of_the_first_rows_and_the_hidden_state_of_all(driver):
    read = driver.runner.ops.memory.read
    step = inputs() | {"rows": np.array([2, 0, 1], np.int32)}
    all_logits, all_hidden = (np.array(read(one)) for one in driver.runner.step(step))
    assert all_logits.shape == (3, 260) and all_hidden.shape == (3, 64)
    for num_logits in range(3):
        logits, hidden = driver.runner.step(step, num_logits)
        assert np.allclose(read(logits), all_logits[:num_logits], rtol=0, atol=1e-5)
        assert np.array_equal(read(hidden), all_hidden)
    assert not np.array_equal(all_hidden[0], all_hidden[1])


def test_more_sizes_than_are_kept_still_run(driver):
    """Views of old sizes are dropped; a size that comes back is bound anew and gives the same."""
    read = driver.runner.ops.memory.read
    first = np.array(read(driver.runner.step(inputs(T=2))[0]))
    for i in range(MAX_BOUND + 10):
        driver.runner.step(inputs(T=1 + i % 60, P=1 + i // 60))
    again, _ = driver.runner.step(inputs(T=2))
    assert np.array_equal(first, read(again))


def test_inputs_need_not_be_contiguous(driver):
    plain = np.array(driver.runner.ops.memory.read(driver.runner.step(inputs())[0]))
    strided = inputs() | {"positions": np.repeat(np.arange(3, dtype=np.int32), 2)[::2]}
    got = driver.runner.ops.memory.read(driver.runner.step(strided)[0])
    assert np.array_equal(plain, got)


def test_what_is_left_in_the_arena_does_not_matter(driver):
    """The same step after another one gives the same bits."""
    [request] = [driver.add(range(40), 40)]
    first = driver.step([(request, 40)])
    other = driver.add(range(100, 160), 60)
    driver.step([(other, 60)])
    request.num_computed = 0
    assert np.array_equal(driver.step([(request, 40)]), first)


def test_caches_are_reached_by_layer(driver):
    assert list(driver.runner.caches) == ["layers.0.kv", "layers.1.kv"]


def test_arena_bytes_are_what_the_largest_step_needs(checkpoint):
    program = emit(read_spec(checkpoint))

    def need(T, R):
        most = {
            Symbol.T: T,
            Symbol.B: 8,
            Symbol.B1: 9,
            Symbol.P: T,
            Symbol.R: R,
            Symbol.X: 4,
            Symbol.U: 4,
        }
        return arena_bytes(program, most)

    assert need(T=128, R=1) > need(T=64, R=1) > 64 * 4 * (64 + 2 * 96)
    assert need(T=64, R=64) >= 64 * 4 * 260
    assert need(T=64, R=1) < need(
        T=64, R=64
    )  # hidden rows alone cost nothing of the vocabulary's size


def test_models_and_runner_need_no_torch():
    code = (
        "import sys, vivace.engine.runner, vivace.engine.models.decoder, "
        "vivace.engine.models.weights; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
