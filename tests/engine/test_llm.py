"""`vivace.LLM` on a tiny random model: what a generation gives."""

from dataclasses import replace

import pytest

from tests.engine.generation import PROMPT_LENGTHS, SAMPLED, config, prompts_of
from vivace import LLM, SamplingParams
from vivace.engine.config import CpuConfig
from vivace.engine.errors import ConfigError, InvalidRequest, Unimplemented
from vivace.kernels.backend import Backend
from vivace.kernels.cpu.library import Library


@pytest.fixture(scope="module")
def llm(tiny_qwen3):
    return LLM(tiny_qwen3, config=config(tiny_qwen3))


@pytest.mark.parametrize("way", ["sharing", "no sharing"])
def test_no_block_is_held_when_all_is_done(llm, way):
    other = LLM(llm.directory, config=config(llm.directory, sharing=way == "sharing"))
    other.generate(prompts_of(llm), SAMPLED)
    loads = other.core.loads()
    assert (loads.num_running, loads.num_waiting, loads.num_blocks_used) == (0, 0, 0)
    assert loads.num_requests_finished == len(PROMPT_LENGTHS)


def test_a_seed_gives_the_same_tokens_and_another_seed_others(llm):
    params = SamplingParams(temperature=1.0, max_tokens=16, seed=5, ignore_eos=True)
    prompt = prompts_of(llm)[2]
    one, two = (llm.generate(prompt, params)[0].outputs[0].token_ids for _ in range(2))
    other = llm.generate(prompt, replace(params, seed=6))[0].outputs[0].token_ids
    assert one == two != other


def test_unseeded_requests_differ(llm):
    params = SamplingParams(temperature=1.5, max_tokens=16, ignore_eos=True)
    results = llm.generate([prompts_of(llm)[2]] * 3, params)
    assert len({result.outputs[0].token_ids for result in results}) == 3


def test_a_stop_token_ends_the_generation_and_is_its_last_token(llm):
    prompt = prompts_of(llm)[3]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    tokens = llm.generate(prompt, greedy)[0].outputs[0].token_ids
    assert len(tokens) == 12
    stop = tokens[5]
    output = llm.generate(prompt, replace(greedy, stop_token_ids=[stop]))[0].outputs[0]
    assert output.token_ids == tokens[: tokens.index(stop) + 1]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)


def test_min_tokens_holds_back_stop_tokens(llm):
    prompt = prompts_of(llm)[3]
    greedy = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    first = llm.generate(prompt, greedy)[0].outputs[0].token_ids[0]
    output = llm.generate(prompt, replace(greedy, stop_token_ids=[first], min_tokens=4))[0].outputs[
        0
    ]
    assert first not in output.token_ids[:4]
    assert len(output.token_ids) > 4


def test_max_tokens_unset_goes_up_to_the_context(llm):
    output = llm.generate(prompts_of(llm)[4], SamplingParams(temperature=0, ignore_eos=True))[0]
    assert len(output.outputs[0].token_ids) == llm.core.info.max_context_tokens - 40
    assert output.outputs[0].finish_reason == "length"


def test_one_params_per_prompt_and_results_in_order(llm):
    prompts = prompts_of(llm)
    params = [SamplingParams(max_tokens=i + 1, ignore_eos=True) for i in range(len(prompts))]
    results = llm.generate(prompts, params)
    assert [len(result.outputs[0].token_ids) for result in results] == list(
        range(1, len(prompts) + 1)
    )
    assert [list(r.prompt_token_ids) for r in results] == [p["prompt_token_ids"] for p in prompts]


def test_more_prompts_than_the_queue_holds(tiny_qwen3):
    small = LLM(tiny_qwen3, config=config(tiny_qwen3, max_running=2, max_waiting=3))
    results = small.generate(
        [{"prompt_token_ids": [3 + i]} for i in range(20)], SamplingParams(max_tokens=2)
    )
    assert len(results) == 20


def test_no_prompts_no_results(llm):
    assert llm.generate([]) == []


def test_logprobs_name_the_chosen_token_and_the_best(llm):
    result = llm.generate(prompts_of(llm)[2], SAMPLED)[0]
    output = result.outputs[0]
    assert len(output.logprobs) == len(output.token_ids)
    for token, place in zip(output.token_ids, output.logprobs, strict=True):
        assert token in place and 3 <= len(place) <= 4
        assert [one.rank for one in place.values()][:3] == [1, 2, 3]
        assert all(one.logprob <= 0 for one in place.values())
    assert result.prompt_logprobs[0] is None
    assert len(result.prompt_logprobs) == len(result.prompt_token_ids)
    for token, place in zip(result.prompt_token_ids[1:], result.prompt_logprobs[1:], strict=True):
        assert token in place


def test_logprobs_not_asked_for_are_none(llm):
    result = llm.generate(prompts_of(llm)[0], SamplingParams(max_tokens=2))[0]
    assert result.outputs[0].logprobs is None and result.prompt_logprobs is None


def test_a_stop_string_ends_the_text_and_frees_the_blocks(llm):
    prompt = prompts_of(llm)[4]
    greedy = SamplingParams(
        temperature=0, max_tokens=40, ignore_eos=True, skip_special_tokens=False
    )
    text = llm.generate(prompt, greedy)[0].outputs[0].text
    stop = text[len(text) // 2 :][:3]
    output = llm.generate(prompt, replace(greedy, stop=stop))[0].outputs[0]
    assert output.text == text[: text.index(stop)]
    assert (output.finish_reason, output.stop_reason) == ("stop", stop)
    assert llm.core.loads().num_blocks_used == 0


def test_replies_are_those_of_their_seeds_and_share_the_prompt(llm):
    prompt = prompts_of(llm)[0]
    params = {"temperature": 1.0, "max_tokens": 12, "ignore_eos": True}
    [several] = llm.generate([prompt], SamplingParams(**params, seed=5, n=3))
    alone = [
        llm.generate([prompt], SamplingParams(**params, seed=5 + i))[0].outputs[0].token_ids
        for i in range(3)
    ]
    assert [output.token_ids for output in several.outputs] == alone
    assert [output.index for output in several.outputs] == [0, 1, 2]
    assert several.usage.completion_tokens == 36


def test_the_best_of_several_replies_have_the_best_mean_logprob(llm):
    prompt = prompts_of(llm)[0]
    params = {"temperature": 1.0, "max_tokens": 12, "seed": 5, "ignore_eos": True}
    [drawn] = llm.generate([prompt], SamplingParams(**params, n=6, logprobs=0))

    def mean(output):
        places = zip(output.token_ids, output.logprobs, strict=True)
        return sum(place[token].logprob for token, place in places) / len(output.token_ids)

    best = sorted(drawn.outputs, key=mean, reverse=True)[:2]
    [found] = llm.generate([prompt], SamplingParams(**params, n=2, best_of=6))
    assert [output.token_ids for output in found.outputs] == [one.token_ids for one in best]
    assert [output.logprobs for output in found.outputs] == [None, None]


def test_echo_puts_the_prompt_first(llm):
    text = "Hello there"
    plain, echoed = (
        llm.generate([text], SamplingParams(temperature=0, max_tokens=3, echo=echo))[0].outputs[0]
        for echo in (False, True)
    )
    assert echoed.text == text + plain.text


def test_nothing_is_written_to_stdout(llm, capfd):
    llm.generate(prompts_of(llm), SAMPLED)
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize(
    ("prompt", "params", "error", "words"),
    [
        ({"prompt_token_ids": []}, {}, InvalidRequest, "at least one token"),
        ({"prompt_token_ids": [10**9]}, {}, InvalidRequest, "prompt must hold.*1000000000"),
        ({"prompt_token_ids": [3] * 4000}, {}, InvalidRequest, "at most \\d+ tokens"),
        ({"tokens": [3]}, {}, InvalidRequest, "tokens"),
        ({"prompt_token_ids": [3]}, {"n": 65}, InvalidRequest, "n must be.*65"),
        ({"prompt_token_ids": [3]}, {"bad_words": ["a"]}, Unimplemented, "bad_words"),
        (
            {"prompt_token_ids": [3]},
            {"temperature": float("nan")},
            InvalidRequest,
            "temperature.*nan",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(llm, prompt, params, error, words):
    before = llm.core.loads()
    with pytest.raises(error, match=words):
        llm.generate([{"prompt_token_ids": [3]}, prompt], SamplingParams(**params))
    assert llm.core.loads() == before


def test_a_way_to_quantize_that_is_none_is_refused(tiny_qwen3):
    with pytest.raises(ConfigError, match="quantize must be one of none, int8, int4, got 'int5'"):
        LLM(tiny_qwen3, quantize="int5")


def test_both_backends_agree(llm):
    """Greedy tokens of the reference, wherever the best two are not level."""
    reference = LLM(llm.directory, config=config(llm.directory, backend=Backend.REFERENCE))
    params = SamplingParams(temperature=0, max_tokens=24, logprobs=2, ignore_eos=True)
    for ours, theirs in zip(
        llm.generate(prompts_of(llm), params),
        reference.generate(prompts_of(llm), params),
        strict=True,
    ):
        places = zip(
            ours.outputs[0].token_ids,
            theirs.outputs[0].token_ids,
            ours.outputs[0].logprobs,
            strict=True,
        )
        for token, other, place in places:
            best, second = sorted((one.logprob for one in place.values()), reverse=True)[:2]
            if best - second < 1e-4:
                break
            assert token == other


@pytest.mark.parametrize("isa", Library(threads=1).isas())
def test_the_instruction_set_that_is_asked_for_is_the_one_that_runs(llm, isa):
    other = LLM(llm.directory, config=replace(config(llm.directory), cpu=CpuConfig(isa=isa)))
    assert other.core.info.isa == other.core._runner.ops.isa == isa
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    [result] = other.generate(prompts_of(llm)[2], params)
    assert len(result.outputs[0].token_ids) == 8


def test_an_instruction_set_that_does_not_exist_is_refused_by_name(tiny_qwen3):
    wanted = replace(config(tiny_qwen3), cpu=CpuConfig(isa="none"))
    with pytest.raises(ConfigError, match=r"cpu\.isa must be one of portable.*, got 'none'"):
        LLM(tiny_qwen3, config=wanted)
