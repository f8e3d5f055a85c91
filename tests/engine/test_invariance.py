"""Nothing around a request changes what it gives, bit by bit: for each architecture, on the CPU backend."""

import random
from dataclasses import replace

import pytest

from tests.architectures import MODELS, ONE_OF_EACH
from tests.engine.generation import (
    MAX_TOKENS,
    PROMPT_LENGTHS,
    SAMPLED,
    config,
    essence,
    prompts_of,
)
from tests.tiny_models import make_checkpoint
from vivace import LLM, SamplingParams

pytestmark = pytest.mark.slow
NAMES = (*ONE_OF_EACH, "phi3-longrope")  # which passes its short context as it decodes


@pytest.fixture(scope="module", params=NAMES)
def llm(request, tmp_path_factory):
    kind, overrides = MODELS[request.param]
    directory = make_checkpoint(tmp_path_factory.mktemp(request.param), kind, **overrides)
    return LLM(directory, config=config(directory))


@pytest.fixture(scope="module")
def alone(llm):
    """Each prompt by itself, nothing in the cache before it."""
    return [
        essence(LLM(llm.directory, config=config(llm.directory)).generate(prompt, SAMPLED))[0]
        for prompt in prompts_of(llm)
    ]


def test_neighbours_change_nothing(llm, alone):
    assert essence(llm.generate(prompts_of(llm), SAMPLED)) == alone


@pytest.mark.parametrize("chunk", [1, 7, 16, 512])
def test_the_chunk_size_changes_nothing(llm, alone, chunk):
    other = LLM(
        llm.directory,
        config=config(llm.directory, max_step_tokens=chunk, max_running=min(chunk, 4)),
    )
    assert essence(other.generate(prompts_of(llm), SAMPLED)) == alone


def test_the_number_of_threads_changes_nothing(llm, alone):
    other = LLM(llm.directory, config=config(llm.directory, threads=2))
    assert essence(other.generate(prompts_of(llm), SAMPLED)) == alone


def test_a_prefix_hit_changes_nothing(llm, alone):
    fresh = LLM(llm.directory, config=config(llm.directory))
    warm_up = replace(SAMPLED, prompt_logprobs=None)
    first = fresh.generate(prompts_of(llm), warm_up)
    again = fresh.generate(prompts_of(llm), warm_up)
    assert [one.usage.cached_tokens for one in first] == [0] * len(first)
    assert [one.usage.cached_tokens for one in again] == [
        (n - 1) // 16 * 16 for n in PROMPT_LENGTHS
    ]
    for results in (first, again):
        for result, (tokens, text, finish, places) in zip(results, alone, strict=True):
            output = result.outputs[0]
            assert (output.token_ids, output.text, output.finish_reason) == (tokens, text, finish)
            got = [
                {t: (o.logprob.hex(), o.rank) for t, o in place.items()}
                for place in output.logprobs
            ]
            assert got == places[: len(got)]
    assert (
        essence(fresh.generate(prompts_of(llm), SAMPLED)) == alone
    )  # prompt logprobs are never cached


def test_preemption_changes_nothing(llm, alone):
    """A cache that holds the longest request and a little more."""
    blocks = -(-(max(PROMPT_LENGTHS) + MAX_TOKENS) // 16) + 1
    block_bytes = llm.core.info.kv_bytes // llm.core.info.num_blocks
    for sharing in (True, False):
        tight = LLM(
            llm.directory,
            config=config(llm.directory, memory_bytes=blocks * block_bytes, sharing=sharing),
        )
        # Many short ones first: under a window they start together, and then there is no room to grow.
        short, every = prompts_of(llm)[:2] * 6, prompts_of(llm)
        results = tight.generate([*short, *every], SAMPLED)
        assert sum(result.usage.num_preemptions for result in results) > 0
        assert essence(results) == alone[:2] * 6 + alone


def test_which_blocks_a_request_gets_changes_nothing(llm, alone):
    other = LLM(llm.directory, config=config(llm.directory, sharing=False))
    mixed = [prompt for prompt in prompts_of(llm) for _ in range(2)]
    random.Random(3).shuffle(mixed)
    other.generate(
        mixed, SamplingParams(max_tokens=9, ignore_eos=True)
    )  # leaves the free list in disorder
    assert essence(other.generate(prompts_of(llm), SAMPLED)) == alone
