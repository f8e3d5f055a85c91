"""Every sampling field is checked at the door, and unset is not zero."""

import math
from dataclasses import fields, replace

import numpy as np
import pytest

from vivace.engine.errors import InvalidRequest, Unimplemented
from vivace.engine.events import Sparse, SparseLimits
from vivace.engine.sampling import (
    MAX_STOP_STRINGS,
    UNSERVED,
    GenerationDefaults,
    ModelLimits,
    Replies,
    SamplingParams,
    SparseParams,
    check_prompt,
    resolve,
    resolve_replies,
)

LIMITS = ModelLimits(vocab_size=100, max_context_tokens=50, defaults=GenerationDefaults())
CHECKPOINT = GenerationDefaults(
    temperature=0.7,
    top_p=0.9,
    top_k=40,
    min_p=0.05,
    repetition_penalty=1.2,
    eos_token_ids=(2, 3),
)


UNSET = Sparse(2048, 8192, 2)
CAN_SELECT = replace(LIMITS, sparse=SparseLimits(None, UNSET, 128, 8))


def sampling(limits=LIMITS, num_prompt_tokens=10, **params):
    return resolve(SamplingParams(**params), limits, num_prompt_tokens)[0]


def test_unset_fields_take_the_engines_defaults_where_the_checkpoint_has_none():
    got = sampling()
    assert (got.temperature, got.top_k, got.top_p, got.min_p) == (1.0, 0, 1.0, 0.0)
    assert (got.max_tokens, got.min_tokens, got.logprobs) == (40, 0, None)
    assert (got.repetition_penalty, got.frequency_penalty, got.presence_penalty) == (1.0, 0.0, 0.0)
    assert got.logit_bias == got.allowed_token_ids == got.bad_token_ids == ()
    assert got.prompt_logprobs_start == 1


def test_unset_fields_take_the_checkpoints_generation_config_and_set_ones_do_not():
    limits = ModelLimits(100, 50, CHECKPOINT)
    got = sampling(limits)
    assert (got.temperature, got.top_k, got.top_p, got.min_p) == (0.7, 40, 0.9, 0.05)
    assert got.repetition_penalty == 1.2
    got = sampling(limits, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    assert (got.temperature, got.top_k, got.top_p, got.min_p) == (0.0, 0, 1.0, 0.0)
    assert got.repetition_penalty == 1.0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            (name, bad)
            for name in (
                "temperature",
                "top_p",
                "min_p",
                "repetition_penalty",
                "frequency_penalty",
                "presence_penalty",
            )
            for bad in (math.nan, math.inf, -math.inf, 10**400, "1", True, [1.0])
        ],
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", 5e-324),
        ("temperature", 1e-40),
        ("temperature", 0.00099),
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
        ("stop_token_ids", 5),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", -1.0),
        ("repetition_penalty", 5e-324),
        ("repetition_penalty", 10.1),
        ("logit_bias", [1, 2]),
        ("logit_bias", {100: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {"1": 1.0}),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", {1: 100.5}),
        ("logit_bias", {1: -math.inf}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: "much"}),
        ("logit_bias", dict.fromkeys(range(1025), 0.0)),
        *[
            (name, bad)
            for name in ("allowed_token_ids", "bad_token_ids")
            for bad in ([100], [-1], [1.0], [True], 7, "a", [3] * 101, ["x" * 10_000])
        ],
        ("n", 0),
        ("n", -1),
        ("n", 65),
        ("n", 2**31 - 1),
        ("n", 1.0),
        ("best_of", 0),
        ("best_of", 65),
        ("prompt_logprobs_start", -1),
        ("prompt_logprobs_start", 10),
        ("prompt_logprobs_start", 0),  # prompt_logprobs is not set
    ],
)
def test_a_bad_value_is_refused_naming_the_field(field, value):
    with pytest.raises(InvalidRequest, match=field) as error:
        sampling(**{field: value})
    assert len(str(error.value)) < 200


def test_the_refusal_shows_the_value():
    words = r"temperature must be 0 or in \[0\.001, 2\], got 2\.5"
    with pytest.raises(InvalidRequest, match=words):
        sampling(temperature=2.5)
    with pytest.raises(InvalidRequest, match=r"logit_bias\[7\] must be in \[-100, 100\], got 101"):
        sampling(logit_bias={7: 101})


@pytest.mark.parametrize("field", UNSERVED)
def test_a_field_that_is_not_served_is_refused_by_name(field):
    with pytest.raises(Unimplemented, match=field):
        sampling(**{field: ["x"]})


def test_the_ends_of_each_range_are_in_it():
    low = {"temperature": 0.001, "repetition_penalty": 0.001, "min_p": 0, "top_p": 1e-9}
    high = {"temperature": 2, "repetition_penalty": 10, "min_p": 1, "top_p": 1}
    for sign, ends in ((-1, low), (1, high)):
        ends |= {"frequency_penalty": 2.0 * sign, "presence_penalty": 2.0 * sign}
        got = sampling(**ends, logit_bias={0: 100 * sign, 99: 0})
        assert {name: getattr(got, name) for name in ends} == ends
        assert got.logit_bias == ((0, 100.0 * sign), (99, 0.0))


@pytest.mark.parametrize("top_p", [5e-324, 1e-46])
def test_a_top_p_that_is_0_in_fp32_is_not_0_for_the_kernel(top_p):
    assert np.float32(top_p) == 0
    assert np.float32(sampling(top_p=top_p).top_p) > 0


def test_tokens_that_are_allowed_or_bad_come_through_each_once():
    got = sampling(allowed_token_ids=[5, 3, 5, 4], bad_token_ids=range(4))
    assert got.allowed_token_ids == (5, 3, 4)
    assert got.bad_token_ids == (0, 1, 2, 3)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"allowed_token_ids": [5], "bad_token_ids": [5, 6]}, "got 1 allowed and 2 bad"),
        ({"bad_token_ids": range(100)}, "got no allowed and 100 bad"),
        ({"allowed_token_ids": [2, 3, 7], "stop_token_ids": [7], "min_tokens": 1}, "min_tokens"),
        ({"allowed_token_ids": [2, 5], "bad_token_ids": [5], "min_tokens": 4}, "min_tokens.* 4"),
        (
            {"bad_token_ids": [i for i in range(100) if i not in (2, 3)], "min_tokens": 1},
            "min_tokens must be 0 where .* leave only tokens that stop, got 1",
        ),
    ],
)
def test_what_leaves_no_token_to_draw_is_refused(params, words):
    with pytest.raises(InvalidRequest, match=words):
        sampling(ModelLimits(100, 50, CHECKPOINT), **params)


@pytest.mark.parametrize(
    "params",
    [
        {"allowed_token_ids": [5, 6], "bad_token_ids": [5]},
        {"bad_token_ids": range(99)},
        {"allowed_token_ids": [2, 3], "stop_token_ids": [7]},
        {"allowed_token_ids": [2, 3], "min_tokens": 2, "ignore_eos": True},
        {"allowed_token_ids": [2, 3, 4], "min_tokens": 2},
        {"bad_token_ids": range(4, 100), "min_tokens": 2},
    ],
)
def test_what_leaves_one_passes(params):
    sampling(ModelLimits(100, 50, CHECKPOINT), **params)


def test_replies():
    assert resolve_replies(SamplingParams()) == Replies(1, 1)
    assert resolve_replies(SamplingParams(n=3)) == Replies(3, 3)
    assert resolve_replies(SamplingParams(n=2, best_of=64)) == Replies(2, 64)
    with pytest.raises(InvalidRequest, match=r"best_of must be .* in 3\.\.64, got 2"):
        sampling(n=3, best_of=2)


def test_prompt_logprobs_start_counts_from_the_second_token():
    assert sampling(prompt_logprobs=2, prompt_logprobs_start=0).prompt_logprobs_start == 1
    assert sampling(prompt_logprobs=2, prompt_logprobs_start=9).prompt_logprobs_start == 9
    words = r"prompt_logprobs_start needs prompt_logprobs, got 3"
    with pytest.raises(InvalidRequest, match=words):
        sampling(prompt_logprobs_start=3)


def test_echo_is_the_text_layers():
    for echo in (None, False, True):
        assert resolve(SamplingParams(echo=echo), LIMITS, 10)[1].echo is (echo is True)


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


@pytest.mark.parametrize("name", ["min_tokens", "n", "seed", "logprobs", "bad_words"])
def test_what_is_said_of_a_huge_value_is_short(name):
    for huge in (10**5000, -(10**5000), "x" * 5000):
        with pytest.raises((InvalidRequest, Unimplemented)) as error:
            resolve(SamplingParams(**({"max_tokens": 3} | {name: huge})), LIMITS, 3)
        assert name in str(error.value) and len(str(error.value)) < 250


def test_sparse_decode_is_off_unless_it_is_asked_for_or_the_default():
    assert sampling().sparse is None and sampling(CAN_SELECT).sparse is None
    by_default = replace(CAN_SELECT, sparse=replace(CAN_SELECT.sparse, default=UNSET))
    assert sampling(by_default).sparse == UNSET
    assert sampling(by_default, sparse={"budget_tokens": 0}).sparse is None


@pytest.mark.parametrize(
    ("wanted", "got"),
    [
        ({}, UNSET),
        (SparseParams(), UNSET),
        ({"budget_tokens": None, "layers_dense": ()}, UNSET),
        ({"budget_tokens": 128}, Sparse(128, 8192, 2)),
        ({"min_context": 0}, Sparse(2048, 0, 2)),
        (SparseParams(layers_dense=[0, 1, 2]), Sparse(2048, 8192, 3)),
        (SparseParams(2**40, 2**40, range(8)), Sparse(2**40, 2**40, 8)),
    ],
)
def test_what_a_request_leaves_open_of_it_is_as_the_engine_is_set(wanted, got):
    assert sampling(CAN_SELECT, sparse=wanted).sparse == got


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"budget": 1}, "sparse must hold only budget_tokens, .* got .'budget'"),
        ({1: 1}, "sparse must hold only"),
        (512, "sparse must be SparseParams or a mapping, got 512"),
        ({"budget_tokens": 127}, "sparse.budget_tokens, if not 0, must be .* 128, got 127"),
        ({"budget_tokens": False}, "sparse.budget_tokens"),
        ({"budget_tokens": "all"}, "sparse.budget_tokens"),
        ({"min_context": 1.5}, "sparse.min_context"),
        ({"layers_dense": 2}, "sparse.layers_dense must be a list of layers, got 2"),
        ({"layers_dense": "01"}, "sparse.layers_dense"),
        ({"layers_dense": [0, True]}, "sparse.layers_dense"),
        ({"layers_dense": [0, 2]}, "sparse.layers_dense .* 0, 1, ... up to 7 .* got .0, 2."),
        ({"layers_dense": [0] * 10_000}, "sparse.layers_dense"),
    ],
)
def test_a_bad_field_of_it_is_refused_by_name(wanted, words):
    with pytest.raises(InvalidRequest, match=words) as error:
        sampling(CAN_SELECT, sparse=wanted)
    assert len(str(error.value)) < 300


def test_a_model_of_windows_alone_refuses_it():
    for wanted in ({}, {"budget_tokens": 0}):
        with pytest.raises(InvalidRequest, match=r"sparse must not be set .* window"):
            sampling(sparse=wanted)
