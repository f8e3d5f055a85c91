"""Our programs against Hugging Face transformers in fp32, on the same random checkpoints, on every
backend."""

from functools import cache

import numpy as np
import pytest

from tests.architectures import MODELS, ONE_OF_EACH
from tests.step_driver import Oracle, agrees, make_driver, worst_row
from tests.tiny_models import make_checkpoint
from vivace.kernels.backend import Backend, load

STEPS = 64
CLOSE = 1e-4  # of logprob: a smaller lead may fall either way


def random_prompts(*lengths):
    rng = np.random.default_rng(7)
    return [rng.integers(0, 256, n).tolist() for n in lengths]


def params():
    """Every model; one of each architecture is enough for `make check`."""
    for name in MODELS:
        yield pytest.param(name, marks=() if name in ONE_OF_EACH else pytest.mark.slow)


@pytest.fixture(scope="module", params=params())
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


@pytest.fixture(params=(Backend.CPU, Backend.REFERENCE), ids=lambda backend: backend.value)
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
