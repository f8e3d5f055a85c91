"""Real checkpoints, whole engine: every recorded row of Hugging Face transformers, on both backends."""

import json

import pytest
import zstandard

from vivace import LLM, SamplingParams
from vivace.engine.config import Config, CpuConfig
from vivace.kernels.backend import Backend

pytestmark = pytest.mark.slow
MIN_MARGIN = 1e-3  # a step whose best two are closer is not compared, nor what follows it
NAMES = {
    "stories260K": "stories260K.dev",
    "aidreams260K": "aidreams260K.dev",
    "northstar-dense": "northstar-dense",
    "northstar-moe": "northstar-moe",
}


def rows_of(shared_data, name):
    packed = (shared_data / "reference" / f"{NAMES[name]}.jsonl.zst").read_bytes()
    text = zstandard.ZstdDecompressor().stream_reader(packed).read().decode()
    return [json.loads(line) for line in text.splitlines()]


def num_comparable(row):
    """Steps before the first whose margin is tiny."""
    for step, top in enumerate(row["top5"]):
        if top[0][1] - top[1][1] < MIN_MARGIN:
            return step
    return len(row["greedy_ids"])


@pytest.mark.parametrize("backend", (Backend.CPU, Backend.REFERENCE), ids=lambda one: one.value)
@pytest.mark.parametrize("name", NAMES)
def test_every_row_has_the_reference_tokens_and_prompt_logprobs(shared_data, name, backend):
    rows = rows_of(shared_data, name)
    directory = shared_data / "models" / name
    cpu = CpuConfig(threads=1) if backend is Backend.CPU else CpuConfig()
    llm = LLM(directory, config=Config(model=directory, backend=backend, cpu=cpu))
    prompts = [{"prompt_token_ids": row["prompt_ids"]} for row in rows]
    params = SamplingParams(temperature=0, max_tokens=64, prompt_logprobs=0)
    worst = 0.0
    for row, result in zip(rows, llm.generate(prompts, params), strict=True):
        count = num_comparable(row)
        assert list(result.outputs[0].token_ids[:count]) == row["greedy_ids"][:count], row["id"]
        places = result.prompt_logprobs[1:]
        got = [
            place[token].logprob for place, token in zip(places, row["prompt_ids"][1:], strict=True)
        ]
        worst = max(
            worst, *(abs(a - b) for a, b in zip(got, row["prompt_logprobs"], strict=True)), 0.0
        )
    assert worst <= 1e-4
    assert len(rows) >= 48


def test_the_sampler_settings_give_the_reference_distributions(shared_data):
    """Frequencies of many seeds against the recorded next-token probabilities."""
    directory = shared_data / "models" / "stories260K"
    llm = LLM(directory)
    row = next(row for row in rows_of(shared_data, "stories260K") if row.get("next_token_dists"))
    for one in row["next_token_dists"]:
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        settings = {name: one[name] for name in names}
        params = [SamplingParams(**settings, max_tokens=1, seed=seed) for seed in range(1500)]
        prompts = [{"prompt_token_ids": row["prompt_ids"]}] * len(params)
        drawn = [result.outputs[0].token_ids[0] for result in llm.generate(prompts, params)]
        probability = dict(one["probs"])
        assert set(drawn) <= set(probability)
        distance = sum(abs(drawn.count(t) / len(drawn) - p) for t, p in probability.items()) / 2
        assert distance < 0.06
