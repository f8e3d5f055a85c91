"""Every sampling field is checked at the door, and unset is not zero."""

import math
from dataclasses import fields

import pytest

from vivace.engine.errors import InvalidRequest, Unimplemented
from vivace.engine.sampling import (
    MAX_STOP_STRINGS,
    UNSERVED,
    GenerationDefaults,
    ModelLimits,
    SamplingParams,
    check_prompt,
    resolve,
)

LIMITS = ModelLimits(vocab_size=100, max_context_tokens=50, defaults=GenerationDefaults())
CHECKPOINT = GenerationDefaults(
    temperature=0.7, top_p=0.9, top_k=40, min_p=0.05, eos_token_ids=(2, 3)
)


def sampling(limits=LIMITS, num_prompt_tokens=10, **params):
    return resolve(SamplingParams(**params), limits, num_prompt_tokens)[0]


def test_unset_fields_take_the_engines_defaults_where_the_checkpoint_has_none():
    got = sampling()
    assert (got.temperature, got.top_k, got.top_p, got.min_p) == (1.0, 0, 1.0, 0.0)
    assert (got.max_tokens, got.min_tokens, got.logprobs) == (40, 0, None)


def test_unset_fields_take_the_checkpoints_generation_config_and_set_ones_do_not():
    limits = ModelLimits(100, 50, CHECKPOINT)
    got = sampling(limits)
    assert (got.temperature, got.top_k, got.top_p, got.min_p) == (0.7, 40, 0.9, 0.05)
    got = sampling(limits, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
    assert (got.temperature, got.top_k, got.top_p, got.min_p) == (0.0, 0, 1.0, 0.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            (name, bad)
            for name in ("temperature", "top_p", "min_p")
            for bad in (math.nan, math.inf)
        ],
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("temperature", True),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("min_p", 1.5),
        ("top_k", -1),
        ("top_k", 2**31),
        ("top_k", 1.0),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("min_tokens", -1),
        ("logprobs", -1),
        ("logprobs", 10**9),
        ("prompt_logprobs", 21),
        ("seed", 2**64),
        ("seed", -(2**63) - 1),
        ("stop", ""),
        ("stop", ["ok", ""]),
        ("stop", "x" * 1_000_000),
        ("stop", ["a"] * (MAX_STOP_STRINGS + 1)),
        ("stop_token_ids", [100]),
        ("stop_token_ids", [-1]),
        ("stop_token_ids", list(range(65))),
        ("presence_penalty", math.nan),
    ],
)
def test_a_bad_value_is_refused_naming_the_field(field, value):
    with pytest.raises(InvalidRequest, match=field) as error:
        sampling(**{field: value})
    assert len(str(error.value)) < 200


def test_the_refusal_shows_the_value():
    with pytest.raises(InvalidRequest, match=r"temperature must be in \[0, 2\], got 2\.5"):
        sampling(temperature=2.5)


@pytest.mark.parametrize("field", UNSERVED)
def test_a_field_that_is_not_served_is_refused_by_name_and_its_neutral_value_is_not(field):
    asking = {"logit_bias": {1: 2.0}, "allowed_token_ids": [1], "bad_words": ["x"]}
    with pytest.raises(Unimplemented, match=field):
        sampling(**{field: asking.get(field, 2)})
    neutral = {"n": 1, "best_of": 1, "repetition_penalty": 1.0}
    sampling(**{field: neutral.get(field, 0.0 if "penalty" in field else None)})


def test_every_field_is_unset_by_default():
    assert all(getattr(SamplingParams(), field.name) is None for field in fields(SamplingParams))


def test_prompt_and_max_tokens_past_the_context_are_cut():
    assert sampling(max_tokens=41).max_tokens == 40
    assert sampling(max_tokens=2**62).max_tokens == 40


def test_min_tokens_over_max_tokens_is_refused():
    with pytest.raises(InvalidRequest, match=r"min_tokens must be at most max_tokens \(3\), got 4"):
        sampling(max_tokens=3, min_tokens=4)


def test_end_tokens_of_the_checkpoint_stop_unless_ignored():
    limits = ModelLimits(100, 50, CHECKPOINT)
    assert sampling(limits, stop_token_ids=[7, 3]).stop_token_ids == (7, 3, 2)
    assert sampling(limits, stop_token_ids=[7], ignore_eos=True).stop_token_ids == (7,)


def test_a_seed_keeps_its_bits_and_an_unset_one_is_drawn_anew():
    assert sampling(seed=-1).seed == 2**64 - 1
    assert sampling(seed=0).seed == 0
    assert sampling().seed != sampling().seed


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "at least one token"),
        ([0] * 50, "at most 49 tokens, with a context of 50, got 50"),
        ([0] * 51, "got 51"),
        ([100], r"prompt must hold whole numbers in 0\.\.99, got 100"),
        ([-1], "got -1"),
        ([1.5], r"got 1\.5"),
        ([True], "got True"),
    ],
)
def test_a_bad_prompt_is_refused(prompt, message):
    with pytest.raises(InvalidRequest, match=message):
        check_prompt(prompt, LIMITS)


def test_the_longest_prompt_that_leaves_room_for_a_token_passes():
    check_prompt([0] * 49, LIMITS)
    assert sampling(num_prompt_tokens=49).max_tokens == 1
