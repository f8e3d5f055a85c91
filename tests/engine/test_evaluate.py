"""Perplexity is what transformers' own loss says; and quantizing costs no more of it than is allowed."""

import json
import math
import random

import pytest
import torch
import zstandard
from transformers import AutoModelForCausalLM

from tests.tiny_models import make_checkpoint
from vivace import LLM
from vivace.bench.cli import main as bench
from vivace.engine.config import Config, SchedulerConfig
from vivace.engine.errors import InvalidRequest
from vivace.engine.evaluate import perplexity

MAX_ABOVE_BY_CACHE = 0.3  # per cent
MAX_ABOVE = 0.5  # per cent
ROWS = {  # of shared/data/reference; which kind counts
    "stories260K": ("stories260K.dev", "story"),
    "northstar-dense": ("northstar-dense", None),
    "northstar-moe": ("northstar-moe", None),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen3", tie_word_embeddings=True)


def rows_of(lengths):
    rng = random.Random(5)
    return [[rng.randrange(256) for _ in range(n)] for n in lengths]


def test_perplexity_is_that_of_all_tokens_with_one_before_them(model):
    rows = rows_of((1, 2, 40, 200))
    oracle = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loss, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logprobs = oracle(torch.tensor([row])).logits[0].log_softmax(-1)
            loss -= sum(float(logprobs[i, token]) for i, token in enumerate(row[1:]))
            count += len(row) - 1
    small = Config(model=model, scheduler=SchedulerConfig(max_step_tokens=16, max_running=4))
    for config in (None, small):
        got = perplexity(LLM(model, config=config).core, rows)
        assert got == pytest.approx(math.exp(loss / count), rel=1e-5)


def test_rows_that_say_nothing_are_refused(model):
    core = LLM(model).core
    for rows in ([], [[3]]):
        with pytest.raises(ValueError, match="no token of"):
            perplexity(core, rows)
    with pytest.raises(InvalidRequest):
        perplexity(core, rows_of([600]))


def quality(model, rows, capsys, *words):
    assert bench("bench", ["quality", str(model), str(rows), *words]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    return {one["name"]: one["median"] for one in record["figures"]}


def test_the_benchmark_tells_the_cost_of_weights_from_that_of_activations(model, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    kinds = ("a", "b", "a")
    texts = rows_of((60, 70, 80))
    lines = [
        {"kind": kind, "prompt_ids": text[:50], "greedy_ids": text[50:]}
        for kind, text in zip(kinds, texts, strict=True)
    ]
    rows.write_text("\n".join(map(json.dumps, lines)))
    found = quality(model, rows, capsys, "--rows-kind", "a")
    plain = perplexity(LLM(model).core, texts[::2])
    assert found["fp32, perplexity"] == pytest.approx(plain)
    by_cache = found["fp32 with an int8 cache, above fp32, %"]
    small = found["fp32 with an int8 cache, perplexity"]
    assert small == pytest.approx(plain * (1 + by_cache / 100)) and small != plain
    for way in ("int8", "int4 g32", "int4 g64", "int4 g128"):
        total = 1 + found[f"{way}, above fp32, %"] / 100
        assert found[f"{way}, perplexity"] == pytest.approx(plain * total)
        weights = 1 + found[f"{way}, of it by weights, %"] / 100
        activations = 1 + found[f"{way}, added by activations, %"] / 100
        assert weights * activations == pytest.approx(total)
        assert weights != 1 and activations != 1
    # 64 inputs are one group of 64 or of 128; the MLP's 96 are two or one.
    assert found["int4 g64, perplexity"] != found["int4 g128, perplexity"]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ROWS)
def test_what_quantizing_costs_stays_within_bounds(shared_data, name, tmp_path, capsys):
    file, kind = ROWS[name]
    packed = (shared_data / "reference" / f"{file}.jsonl.zst").read_bytes()
    rows = tmp_path / "rows.jsonl"
    rows.write_bytes(zstandard.ZstdDecompressor().stream_reader(packed).read())
    words = () if kind is None else ("--rows-kind", kind)
    found = quality(shared_data / "models" / name, rows, capsys, *words)
    assert found["int8, above fp32, %"] <= MAX_ABOVE
    assert found["fp32 with an int8 cache, above fp32, %"] <= MAX_ABOVE_BY_CACHE
    for group in (32, 64, 128):
        assert found[f"int4 g{group}, added by activations, %"] <= MAX_ABOVE
