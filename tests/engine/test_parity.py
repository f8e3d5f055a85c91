"""Our programs against Hugging Face transformers in fp32, on the same random checkpoints, on every
backend."""

import json
from functools import cache

import numpy as np
import pytest
import zstandard

from tests.architectures import MODELS
from tests.step_driver import Oracle, agrees, make_driver, worst_row
from tests.tiny_models import make_checkpoint
from vivace.engine.models.generation_config import read_generation_defaults
from vivace.kernels.backend import Backend, load

STEPS = 64
CLOSE = 1e-4  # of logprob: a smaller lead may fall either way


def random_prompts(*lengths):
    rng = np.random.default_rng(7)
    return [rng.integers(0, 256, n).tolist() for n in lengths]


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, tmp_path_factory):
    kind, overrides = MODELS[request.param]
    return make_checkpoint(tmp_path_factory.mktemp(request.param), kind, **overrides)


@cache  # one reading of a checkpoint serves both backends
def oracle_of(directory):
    return Oracle(directory)


@cache
def greedy_of(directory):
    short, long = random_prompts(*[9] * 5), random_prompts(*[33] * 5)
    oracle = oracle_of(directory)
    return short + long, oracle.greedy(short, STEPS) + oracle.greedy(long, STEPS)


@pytest.fixture(params=Backend, ids=lambda backend: backend.value)
def driver(request, checkpoint):
    return make_driver(checkpoint, load(request.param))


@pytest.mark.parametrize("chunk", [1, 7, 64, 300])
def test_logits_of_a_whole_prompt_are_those_of_transformers(driver, checkpoint, chunk):
    [prompt] = random_prompts(40 if chunk == 1 else 300)  # 300: past a split of 256 positions
    want = oracle_of(checkpoint).logits(prompt)
    assert worst_row(driver.prompt_logits(prompt, chunk), want) <= 1e-4


def test_one_program_runs_at_any_number_of_tokens(driver, checkpoint):
    program = driver.program
    [prompt] = random_prompts(1 + 7 + 64)
    request = driver.add(prompt, len(prompt))
    got = np.concatenate([driver.step([(request, T)]) for T in (1, 7, 64)])
    assert worst_row(got, oracle_of(checkpoint).logits(prompt)) <= 1e-4
    assert driver.program is program


def test_prompts_and_decoding_rows_share_a_step(driver, checkpoint):
    """Three requests at different stages in one step, each as if it were alone."""
    prompts = random_prompts(33, 20, 5)
    first, second, third = (driver.add(prompt, len(prompt)) for prompt in prompts)
    driver.step([(first, 32), (second, 8)])
    got = driver.step([(third, 5), (first, 1), (second, 12)])
    oracle = oracle_of(checkpoint)
    third_want, first_want, second_want = (oracle.logits(prompts[i]) for i in (2, 0, 1))
    want = np.concatenate([third_want, first_want[32:], second_want[8:]])
    assert worst_row(got, want) <= 1e-4


def test_greedy_tokens_are_those_of_transformers(driver, checkpoint):
    prompts, wanted = greedy_of(checkpoint)
    got = driver.greedy(prompts, STEPS)
    assert all(agrees(a, b, CLOSE) for a, b in zip(got, wanted, strict=True))
    through = sum(want.first_close(CLOSE) == STEPS for want in wanted)
    assert through >= 0.9 * len(prompts)


def reference_rows(shared_data, name):
    """Recorded greedy tokens and prompt logprobs, with text that transformers wrote."""
    [path] = (shared_data / "reference").glob(f"{name}*.jsonl.zst")
    with path.open("rb") as file:
        text = zstandard.ZstdDecompressor().stream_reader(file).read().decode()
    return [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize("backend", Backend, ids=lambda backend: backend.value)
@pytest.mark.parametrize("name", ["stories260K", "aidreams260K", "northstar-dense"])
def test_real_checkpoints_give_the_recorded_tokens_and_logprobs(shared_data, name, backend):
    directory = shared_data / "models" / name
    driver = make_driver(directory, load(backend))
    stop = frozenset(read_generation_defaults(directory).eos_token_ids)
    rows = [row for row in reference_rows(shared_data, name) if len(row["prompt_ids"]) < 300][:6]
    got = driver.greedy([row["prompt_ids"] for row in rows], STEPS, stop=stop)
    for row, tokens in zip(rows, got, strict=True):
        if row["min_margin"] >= 1e-3:
            assert tokens == row["greedy_ids"][:STEPS]
        prompt = row["prompt_ids"]
        logits = driver.prompt_logits(prompt, 64).astype(np.float64)
        logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
        chosen = logprobs[np.arange(len(prompt) - 1), prompt[1:]]
        np.testing.assert_allclose(chosen, row["prompt_logprobs"], atol=1e-4, rtol=0)
