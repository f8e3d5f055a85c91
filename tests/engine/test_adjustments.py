"""What a request asks of its logits: counted right whatever happens to it, and what transformers and OpenAI mean by it."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.engine.generation import config
from tests.step_driver import Oracle
from vivace import LLM, SamplingParams
from vivace.engine.adjustments import Adjustments
from vivace.engine.events import Sampling
from vivace.engine.request import Request
from vivace.kernels.backend import Backend

V = 100
PLAIN = Sampling(1.0, 0, 1.0, 0.0, 0, 50, 0, (), None, None)
PENALTIES = {"repetition_penalty": 1.5, "frequency_penalty": 0.25, "presence_penalty": -0.5}


def request(slot, prompt, reply=(), **sampling):
    tokens = [*prompt, *reply]
    return Request(f"r{slot}", tokens, len(prompt), replace(PLAIN, **sampling), 0.0, slot=slot)


def entered(*requests):
    adjustments = Adjustments(8, V)
    for one in requests:
        adjustments.enter(one)
    return adjustments


def penalized(rows, row):
    """Token to count, of one row."""
    start, end = rows.penalty_starts[row : row + 2]
    ids = rows.penalty_ids[start:end].tolist()
    assert len(set(ids)) == len(ids)
    return dict(zip(ids, rows.penalty_counts[start:end].tolist(), strict=True))


def biases(rows, row):
    """Token to the sum of its biases, of one row."""
    start, end = rows.bias_starts[row : row + 2]
    found = Counter()
    for token, value in zip(rows.bias_ids[start:end], rows.bias_values[start:end], strict=True):
        found[int(token)] += float(value)
    return dict(found)


def test_steps_without_adjustments_make_no_arrays():
    plain = [request(slot, [1, 2]) for slot in range(5)]
    adjustments = entered(*plain)
    rows = adjustments.rows(plain)
    assert rows.repetition_R.tolist() == [1] * 5
    assert rows.frequency_R.tolist() == rows.presence_R.tolist() == [0] * 5
    assert rows.penalty_starts.tolist() == rows.bias_starts.tolist() == [0] * 6
    assert len(rows.penalty_ids) == len(rows.penalty_counts) == len(rows.bias_ids) == 0

    def is_made_once(requests):
        again = adjustments.rows(requests)
        return np.shares_memory(again.repetition_R, rows.repetition_R)

    assert is_made_once(plain) and is_made_once(plain[:2])
    asks = request(5, [1], bad_token_ids=(4,))
    adjustments.enter(asks)
    assert is_made_once(plain)  # who asks is not in this step
    assert not is_made_once([asks])
    adjustments.enter(request(5, [1]))  # who asked is gone
    assert is_made_once([*plain, asks])


def test_each_row_has_what_its_request_asks():
    penalty = request(4, [7, 7, 8], [9, 7], **PENALTIES)
    plain = request(0, [5])
    bias = request(2, [6], logit_bias=((3, 1.5), (4, -2.0)), bad_token_ids=(4, 50))
    rows = entered(penalty, plain, bias).rows([bias, plain, penalty])
    assert rows.repetition_R.tolist() == [1, 1, 1.5]
    assert rows.frequency_R.tolist() == [0, 0, 0.25]
    assert rows.presence_R.tolist() == [0, 0, -0.5]
    assert [penalized(rows, row) for row in range(3)] == [{}, {}, {7: 1, 8: 0, 9: 1}]
    assert biases(rows, 0) == {3: 1.5, 4: -np.inf, 50: -np.inf}
    assert [biases(rows, row) for row in (1, 2)] == [{}] * 2
    ints = (rows.penalty_starts, rows.penalty_ids, rows.penalty_counts, rows.bias_starts)
    assert {array.dtype for array in (*ints, rows.bias_ids)} == {np.dtype(np.int32)}
    floats = (rows.repetition_R, rows.frequency_R, rows.presence_R, rows.bias_values)
    assert {array.dtype for array in floats} == {np.dtype(np.float32)}


def test_all_but_the_allowed_tokens_are_forbidden():
    one = request(0, [1], allowed_token_ids=(3, 99), bad_token_ids=(3,), logit_bias=((99, 2.0),))
    rows = entered(one).rows([one])
    assert biases(rows, 0) == dict.fromkeys(range(99), -np.inf) | {99: 2.0}


def test_biases_are_joined_anew_only_where_one_has_changed():
    """A few allowed tokens are a bias of all others, which takes milliseconds to copy for some rows of a large vocabulary."""
    few = [request(slot, [1, 2], allowed_token_ids=(3, slot + 4)) for slot in range(3)]
    plain = request(3, [1])
    adjustments = entered(*few, plain)

    def ids(*requests):
        rows = adjustments.rows(requests)
        for row, one in enumerate(requests):
            allowed = one.sampling.allowed_token_ids
            assert set(biases(rows, row)) == (set(range(V)) - set(allowed) if allowed else set())
        return rows.bias_ids

    first = ids(*few, plain)
    assert np.shares_memory(first, ids(*few, plain))
    assert not np.shares_memory(first, ids(plain, *few))
    assert not np.shares_memory(ids(*few), ids(*few[::-1]))
    adjustments.enter(request(3, [1], bad_token_ids=(7,)))
    few.append(request(3, [1], bad_token_ids=(7,)))
    assert biases(adjustments.rows(few), 3) == {7: -np.inf}


def test_stop_tokens_are_forbidden_until_min_tokens_are_there():
    one = request(0, [1], min_tokens=2, stop_token_ids=(8, 9), bad_token_ids=(5,))
    adjustments = entered(one)
    for _ in range(2):
        assert biases(adjustments.rows([one]), 0) == dict.fromkeys((5, 8, 9), -np.inf)
        one.tokens.append(2)
    assert biases(adjustments.rows([one]), 0) == {5: -np.inf}


TOKENS = st.lists(st.integers(0, V - 1), max_size=30)


@given(TOKENS.filter(bool), TOKENS, TOKENS, st.booleans())
def test_counts_that_grow_are_those_of_a_request_that_starts_again(prompt, before, after, repeats):
    """`before` is there when it starts, as after a preemption; `after` comes token by token."""
    settings = PENALTIES if repeats else {"presence_penalty": 1.0}
    one = request(3, prompt, before, max_tokens=60, **settings)
    adjustments = entered(one)
    for token in after:
        adjustments.rows([one])
        one.tokens.append(token)
    want = Counter([*before, *after])
    if repeats:  # the repetition penalty alone looks at the prompt
        want.update(dict.fromkeys(prompt, 0))
    assert penalized(adjustments.rows([one]), 0) == want
    one.slot = 5
    adjustments.enter(one)
    assert penalized(adjustments.rows([one]), 0) == want


# Whole generations.

PROMPTS = [np.random.default_rng(i).integers(0, 256, 12).tolist() for i in range(4)]
STEPS = 48
CLOSE = 1e-4  # of a score: a smaller lead may fall either way


@pytest.fixture(scope="module")
def llm(tiny_qwen3):
    return LLM(tiny_qwen3, config=config(tiny_qwen3))


@pytest.fixture(scope="module")
def oracle(tiny_qwen3):
    return Oracle(tiny_qwen3)


def generate(llm, prompts=PROMPTS, **params):
    settings = SamplingParams(**({"max_tokens": STEPS, "ignore_eos": True} | params))
    results = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], settings)
    return [list(result.outputs[0].token_ids) for result in results]


def num_clear(leads):
    """Steps before the first whose best two scores are close."""
    return next((i for i, lead in enumerate(leads) if lead < CLOSE), len(leads))


@pytest.mark.parametrize("penalty", [1.3, 0.8, 10.0])
def test_greedy_with_a_repetition_penalty_is_what_transformers_generates(llm, oracle, penalty):
    got = generate(llm, temperature=0, repetition_penalty=penalty)
    assert got != generate(llm, temperature=0)
    out = oracle.model.generate(
        torch.tensor(PROMPTS),
        attention_mask=torch.ones(len(PROMPTS), len(PROMPTS[0]), dtype=torch.long),
        do_sample=False,
        max_new_tokens=STEPS,
        eos_token_id=None,
        repetition_penalty=penalty,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.stack([step.topk(2).values for step in out.scores], dim=1)
    clear = [num_clear((one[:, 0] - one[:, 1]).tolist()) for one in best]
    want = out.sequences[:, len(PROMPTS[0]) :].tolist()
    assert [a[:n] for a, n in zip(got, clear, strict=True)] == [
        a[:n] for a, n in zip(want, clear, strict=True)
    ]
    assert sum(clear) >= 0.9 * STEPS * len(PROMPTS)


@pytest.mark.parametrize(
    "settings",
    [
        {"frequency_penalty": 0.3},
        {"presence_penalty": 1.5},
        {"frequency_penalty": -0.1, "presence_penalty": 2.0, "logit_bias": {65: 3.5, 66: -7.0}},
    ],
)
def test_greedy_with_the_other_penalties_is_what_their_formula_gives(llm, oracle, settings):
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, c counted over the reply alone; in fp64."""
    got = generate(llm, PROMPTS[:2], temperature=0, **settings)
    assert got != generate(llm, PROMPTS[:2], temperature=0)
    num_compared = 0
    for prompt, reply in zip(PROMPTS, got, strict=False):
        # Teacher-forced: each step is compared on the reply so far.
        logits = oracle.logits([*prompt, *reply])[len(prompt) - 1 : -1].astype(np.float64)
        for step, scores in enumerate(logits):
            counts = np.bincount(reply[:step], minlength=len(scores))
            scores -= counts * settings.get("frequency_penalty", 0.0)
            scores -= (counts > 0) * settings.get("presence_penalty", 0.0)
            for token, bias in settings.get("logit_bias", {}).items():
                scores[token] += bias
            second, first = np.sort(scores)[-2:]
            if first - second >= CLOSE:
                assert reply[step] == scores.argmax()
                num_compared += 1
    assert num_compared >= 0.9 * STEPS * 2


def test_only_allowed_tokens_are_drawn_and_bad_ones_never(llm):
    params = {"temperature": 2.0, "seed": 3, "top_k": 50}
    allowed, bad = [5, 70, 71, 200], [70]
    drawn = {t for reply in generate(llm, allowed_token_ids=allowed, **params) for t in reply}
    assert drawn == set(allowed)
    drawn = {
        t
        for reply in generate(llm, allowed_token_ids=allowed, bad_token_ids=bad, **params)
        for t in reply
    }
    assert drawn == set(allowed) - set(bad)
    common = generate(llm, temperature=0)[0][0]
    assert all(common not in reply for reply in generate(llm, bad_token_ids=[common], **params))


def test_a_bias_of_100_takes_a_token_and_of_minus_100_shuns_it(llm):
    assert generate(llm, temperature=1.0, logit_bias={77: 100.0}) == [[77] * STEPS] * 4
    [first, *_] = generate(llm, temperature=0)
    [other, *_] = generate(llm, temperature=0, logit_bias={first[0]: -100.0})
    assert first[0] not in other


def test_min_tokens_and_a_bias_for_the_end_token_end_where_they_should(llm):
    ends = {"ignore_eos": False, "logit_bias": {257: 100.0}, "temperature": 0.7}
    assert [len(reply) for reply in generate(llm, **ends)] == [1] * 4
    replies = generate(llm, **ends, min_tokens=7)
    assert [reply.index(257) for reply in replies] == [7] * 4


MIXED = [
    SamplingParams(seed=seed, temperature=temperature, max_tokens=40, ignore_eos=True, **settings)
    for seed, (temperature, settings) in enumerate(
        [
            (0.9, PENALTIES),
            (1.0, {}),
            (0.8, {"repetition_penalty": 1.4, "top_p": 0.9}),
            (0.0, {"frequency_penalty": 0.7}),
            (1.2, {"allowed_token_ids": list(range(40, 120)), "presence_penalty": 1.0}),
            (1.0, {"logit_bias": {50: 4.0}, "bad_token_ids": [51, 52], "stop_token_ids": [53]}),
            (0.7, {"min_tokens": 30, "stop_token_ids": list(range(60, 90))}),
        ]
    )
]
LENGTHS = (5, 30, 3, 9, 4, 24, 40)


def mixed(llm, repeats=1):
    prompts = [
        {"prompt_token_ids": np.random.default_rng(n).integers(0, 256, n).tolist()} for n in LENGTHS
    ]
    return llm.generate(prompts * repeats, MIXED * repeats)


def tokens_of(results):
    return [result.outputs[0].token_ids for result in results]


@pytest.fixture(scope="module")
def alone(tiny_qwen3):
    """Each by itself: the one request that the engine has ever seen."""
    results = []
    for i in range(len(MIXED)):
        fresh = LLM(tiny_qwen3, config=config(tiny_qwen3))
        prompt = np.random.default_rng(LENGTHS[i]).integers(0, 256, LENGTHS[i]).tolist()
        results += fresh.generate({"prompt_token_ids": prompt}, MIXED[i])
    return tokens_of(results)


def test_neighbours_change_nothing(llm, alone):
    assert tokens_of(mixed(llm)) == alone
    assert tokens_of(mixed(llm, repeats=3)) == alone * 3


@pytest.mark.parametrize("chunk", [2, 7])
def test_the_chunk_size_changes_nothing(tiny_qwen3, alone, chunk):
    narrow = config(tiny_qwen3, max_step_tokens=chunk, max_running=min(chunk, 4))
    assert tokens_of(mixed(LLM(tiny_qwen3, config=narrow))) == alone


@pytest.mark.parametrize("sharing", [True, False])
def test_preemption_changes_nothing(llm, tiny_qwen3, alone, sharing):
    """A cache that holds the longest request and a little more."""
    info = llm.core.info
    memory = info.kv_bytes // info.num_blocks * 8
    tight = LLM(tiny_qwen3, config=config(tiny_qwen3, memory_bytes=memory, sharing=sharing))
    results = mixed(tight, repeats=4)
    preempted = {i % len(MIXED) for i, one in enumerate(results) if one.usage.num_preemptions}
    assert {2, 3} <= preempted  # which have penalties
    assert tokens_of(results) == alone * 4


def test_both_backends_give_the_same_tokens(tiny_qwen3, alone):
    reference = config(tiny_qwen3, backend=Backend.REFERENCE)
    assert tokens_of(mixed(LLM(tiny_qwen3, config=reference))) == alone
