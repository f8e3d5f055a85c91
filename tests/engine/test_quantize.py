"""Quantized models: which weights are rounded, that both backends agree, and that nothing around a request shows."""

import json
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.architectures import MODELS
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
from vivace.engine.cli import main
from vivace.engine.config import CacheConfig, Config, KvDType, WeightsConfig
from vivace.engine.errors import ConfigError
from vivace.engine.models.decoder import emit
from vivace.engine.models.hf_config import read_spec
from vivace.engine.models.program import Kind, Symbol, assign_slots, values_of
from vivace.engine.models.quantize import MAKERS, Quantize, quantize
from vivace.engine.plan import Machine, make_plan, meta_bytes, program_of
from vivace.kernels import backend
from vivace.kernels.backend import Backend, load
from vivace.kernels.buffer import DType

KINDS = {"int8": Quantize.INT8, "int4": Quantize.INT4}
NAMES = ("qwen3", "gemma2", "qwen2-moe", "gpt-oss")  # tied, softcaps, gates, experts with biases
GROUP = 32  # 64 inputs are two groups, 96 three


def quantized(directory, kind, **settings):
    """With a cache of int8, too."""
    weights = WeightsConfig(quantize=KINDS[kind], group=GROUP)
    plain = config(directory, **settings)
    return replace(plain, weights=weights, cache=replace(plain.cache, dtype=KvDType.INT8))


@pytest.fixture(scope="module", params=NAMES)
def directory(request, tmp_path_factory):
    kind, overrides = MODELS[request.param]
    return make_checkpoint(tmp_path_factory.mktemp(request.param), kind, **overrides)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def llm(directory, kind):
    return LLM(directory, config=quantized(directory, kind))


@pytest.fixture(scope="module")
def alone(llm, directory, kind):
    """Each prompt by itself, nothing in the cache before it."""
    return [
        essence(LLM(directory, config=quantized(directory, kind)).generate(prompt, SAMPLED))[0]
        for prompt in prompts_of(llm)
    ]


def types_of(program):
    return {value.name: value.dtype for value in values_of(program) if value.kind is Kind.WEIGHT}


def test_projections_and_experts_are_rounded_and_gates_norms_and_biases_are_not(directory, kind):
    plain = emit(read_spec(directory))
    program = quantize(plain, KINDS[kind], GROUP)
    small = KINDS[kind].value
    for name, dtype in types_of(program).items():
        if name in ("embed", "lm_head"):
            assert dtype is DType.INT8, name
        elif name.endswith((".qkv", ".out", ".gate_up", ".down")):
            assert dtype.value == small, name
        else:
            assert dtype is DType.FP32, name
    assert types_of(program).keys() == types_of(plain).keys()
    assert (program.logits, program.hidden) == (plain.logits, plain.hidden)
    assert quantize(plain, Quantize.NONE, GROUP) is plain


def test_what_several_read_is_quantized_once_and_before(directory, kind):
    program = quantize(emit(read_spec(directory)), KINDS[kind], GROUP)
    read, made = [], []
    for call in program.calls:
        if call.op.endswith("quantize"):
            made.append(call.outs[-2:])
        if call.op.endswith(("linear_int8", "linear_int4")):
            read.append(call.ins[:2])
            assert call.ins[:2] in made
    assert len(set(made)) == len(made) == len(set(read)) > 4


def test_norms_and_activations_that_are_read_as_bytes_alone_are_never_kept(directory, kind):
    program = quantize(emit(read_spec(directory)), KINDS[kind], GROUP)
    readers = Counter(value.owner for call in program.calls for value in call.ins)
    makers = {value.owner: call.op for call in program.calls for value in call.outs}
    for call in program.calls:
        if call.op == "quantize":
            [x] = call.ins
            is_needed = readers[x.owner] > 1 or x.owner is program.hidden.owner
            assert makers[x.owner] not in MAKERS or x is not x.owner or is_needed, call
    fused = {f"{op}_quantize" for op in MAKERS}
    assert sum(call.op in fused for call in program.calls) >= 2
    assert set(makers) >= {program.hidden, program.logits}


def test_no_slot_is_shared_by_two_that_live_at_once(directory, kind):
    program = quantize(emit(read_spec(directory)), KINDS[kind], GROUP)
    slots = assign_slots(program, dict.fromkeys(Symbol, 7))
    born, last = {}, {}
    for i, call in enumerate(program.calls):
        for value in call.outs:
            born.setdefault(value.owner, i)
        last.update({value.owner: i for value in (*call.outs, *call.ins)})
    last[program.hidden.owner] = last[program.logits.owner] = len(program.calls)
    values = [(value, slot, value.dtype) for value, slot in slots.items()]
    for a, slot_a, dtype_a in values:
        for b, slot_b, dtype_b in values:
            if a is not b and slot_a == slot_b:
                assert dtype_a is dtype_b and (last[a] < born[b] or last[b] < born[a])


def test_both_backends_give_the_same_tokens(llm, directory, kind):
    """Wherever the best two are not level; and about the same logprobs everywhere."""
    plain = LLM(directory, config=quantized(directory, kind, backend=Backend.REFERENCE))
    assert (llm.core.info.dtype, plain.core.info.dtype) == (kind, kind)
    params = SamplingParams(
        temperature=0, max_tokens=12, logprobs=2, ignore_eos=True, prompt_logprobs=0
    )
    num_same, off = 0, []
    results = (one.generate(prompts_of(llm), params) for one in (llm, plain))
    for ours, theirs in zip(*results, strict=True):
        prompt = ours.prompt_token_ids[1:]
        for i, token in enumerate(prompt, 1):
            places = ours.prompt_logprobs[i], theirs.prompt_logprobs[i]
            off.append(abs(places[0][token].logprob - places[1][token].logprob))
        one, two = ours.outputs[0], theirs.outputs[0]
        for got, want, place in zip(one.token_ids, two.token_ids, two.logprobs, strict=True):
            best, second = sorted((x.logprob for x in place.values()), reverse=True)[:2]
            if best - second < 0.05:  # an activation may round to the next byte
                break
            assert got == want
            num_same += 1
    assert num_same >= 8
    assert np.mean(off) < 0.01 and max(off) < 0.1


def test_neighbours_change_nothing(llm, alone):
    assert essence(llm.generate(prompts_of(llm), SAMPLED)) == alone


@pytest.mark.parametrize("chunk", [1, 7, 512])
def test_the_chunk_size_changes_nothing(llm, alone, kind, chunk):
    settings = quantized(llm.directory, kind, max_step_tokens=chunk, max_running=min(chunk, 4))
    assert essence(LLM(llm.directory, config=settings).generate(prompts_of(llm), SAMPLED)) == alone


@pytest.mark.parametrize("threads", [2, 4])
def test_the_number_of_threads_changes_nothing(llm, alone, kind, threads):
    other = LLM(llm.directory, config=quantized(llm.directory, kind, threads=threads))
    assert essence(other.generate(prompts_of(llm), SAMPLED)) == alone


def test_calling_op_by_op_changes_nothing(llm, alone, kind, monkeypatch):
    """The loop in Python, on several threads, is what the replay is held to."""
    plain = replace(load(Backend.CPU, threads=2), recorder=None)
    monkeypatch.setattr(backend, "load", lambda *_args, **_kwargs: plain)
    other = LLM(llm.directory, config=quantized(llm.directory, kind))
    assert other.core._runner.ops is plain
    assert llm.core._runner.ops.recorder is not None
    assert essence(other.generate(prompts_of(llm), SAMPLED)) == alone


def test_a_prefix_hit_changes_nothing(llm, alone, kind):
    fresh = LLM(llm.directory, config=quantized(llm.directory, kind))
    warm_up = replace(SAMPLED, prompt_logprobs=None)
    fresh.generate(prompts_of(llm), warm_up)
    again = fresh.generate(prompts_of(llm), warm_up)
    assert sum(one.usage.cached_tokens for one in again) > 0
    for result, (tokens, _, _, places) in zip(again, alone, strict=True):
        output = result.outputs[0]
        got = [
            {t: (o.logprob.hex(), o.rank) for t, o in place.items()} for place in output.logprobs
        ]
        assert (output.token_ids, got) == (tokens, places[: len(got)])


def test_preemption_changes_nothing(llm, alone, kind):
    blocks = -(-(max(PROMPT_LENGTHS) + MAX_TOKENS) // 16) + 1
    block_bytes = llm.core.info.kv_bytes // llm.core.info.num_blocks
    tight = LLM(
        llm.directory, config=quantized(llm.directory, kind, memory_bytes=blocks * block_bytes)
    )
    short, every = prompts_of(llm)[:2] * 6, prompts_of(llm)
    random.Random(3).shuffle(short)
    results = tight.generate([*short, *every], SAMPLED)
    assert sum(result.usage.num_preemptions for result in results) > 0
    assert essence(results[len(short) :]) == alone


def test_a_start_from_the_cache_changes_nothing(llm, alone, kind, tmp_path):
    settings = quantized(llm.directory, kind)
    settings = replace(settings, weights=replace(settings.weights, cache_dir=tmp_path))
    origins = []
    for _ in range(2):
        other = LLM(llm.directory, config=settings)
        origins.append(other.core.info.weights)
        assert essence(other.generate(prompts_of(llm), SAMPLED)) == alone
    assert "kept in" in origins[0] and "huge pages" in origins[1]


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tied"), "qwen3", tie_word_embeddings=True)


def test_int8_is_the_nearest_of_255_levels(tied):
    w = load_file(tied / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    scale = np.abs(w).max(axis=1, keepdims=True).astype(np.float64) / 127
    levels = np.arange(-127, 128)
    nearest = levels[np.abs(w[:, :, None] / scale[:, :, None] - levels).argmin(axis=2)] * scale
    got = dequantized(tied, "int8", "layers.0.mlp.down")
    np.testing.assert_allclose(got, nearest, rtol=1e-6, atol=1e-9)


def test_int4_is_the_nearest_of_16_levels_of_its_group(tied):
    w = load_file(tied / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    groups = w.reshape(len(w), -1, GROUP)
    extreme = np.take_along_axis(groups, np.abs(groups).argmax(axis=2)[:, :, None], axis=2)
    step = (extreme / -8).astype(np.float16).astype(np.float64)
    levels = np.arange(-8, 8)
    nearest = levels[np.abs((groups / step)[:, :, :, None] - levels).argmin(axis=3)] * step
    got = dequantized(tied, "int4", "layers.0.mlp.down")
    np.testing.assert_allclose(got, nearest.reshape(w.shape), rtol=1e-6, atol=1e-9)


def dequantized(directory, kind, name):
    """What a packed matrix does to each unit vector: 255 with a scale of 1/255 stands for 1."""
    core = LLM(directory, config=quantized(directory, kind)).core
    runner = core._runner
    program = program_of(quantized(directory, kind), read_spec(directory))
    weight = dict(zip([v.name for v in values_of(program)], runner._fixed, strict=False))[name]
    N, K = weight.shape
    out = np.empty((K, N), np.float32)
    params = np.tile(np.float32([1 / 255, 0]), (K, 1))
    getattr(runner.ops, f"linear_{kind}")(out, (255 * np.eye(K)).astype(np.uint8), params, weight)
    return out.T


def test_a_tied_matrix_is_one_weight(tied):
    program = quantize(emit(read_spec(tied)), Quantize.INT4, GROUP)
    [embed] = [call for call in program.calls if call.op == "embed_int8"]
    assert embed.ins[1] == program.calls[-1].ins[2] and program.calls[-1].op == "linear_int8"


def test_the_plan_counts_what_is_kept(tied):
    machine = Machine(2, 1 << 34)
    sizes = {}
    ways = {"none": config(tied)} | {word: quantized(tied, word) for word in KINDS}
    for word, settings in ways.items():
        spec = read_spec(tied)
        plan = make_plan(settings, spec, program_of(settings, spec), machine)
        sizes[word] = plan.weight_bytes
        kept = LLM(tied, config=settings).core._runner._fixed
        if word != "none":
            packed = sum(one.data.nbytes for one in kept if hasattr(one, "group"))
            assert 0 < plan.weight_bytes - packed < 4096  # norms
            assert word in plan.weight_kinds and "fp32" in plan.weight_kinds
    assert sizes["int4"] < sizes["int8"] < 0.35 * sizes["none"]


def test_a_cache_of_fewer_bits_holds_more_tokens(tied):
    sizes = {}  # of a block's keys and values
    for kind in KvDType:
        settings = replace(config(tied), cache=CacheConfig(memory_bytes=1 << 20, dtype=kind))
        llm = LLM(tied, config=settings)
        info, known = llm.core.info, meta_bytes(program_of(settings, read_spec(tied)), 16)
        sizes[kind] = info.kv_bytes // info.num_blocks - known
        assert llm.core.info.kv_dtype == kind.value
        types = {cache.dtype.name for cache in llm.core._runner.caches.values()}
        assert types == {{"fp32": "float32", "bf16": "uint16", "int8": "int8"}[kind.value]}
    assert 2 * sizes[KvDType.BF16] == sizes[KvDType.FP32]
    head_dim = 16
    assert sizes[KvDType.INT8] * 4 * head_dim == sizes[KvDType.FP32] * (head_dim + 4)


def test_a_cache_of_bf16_changes_little_and_neighbours_nothing(tied):
    settings = replace(config(tied), cache=CacheConfig(dtype=KvDType.BF16))
    params = replace(SAMPLED, max_tokens=1)
    results = {}
    for name, one in (("bf16", settings), ("fp32", config(tied))):
        llm = LLM(tied, config=one)
        results[name] = llm.generate(prompts_of(llm), params)
        alone = [LLM(tied, config=one).generate(prompt, params)[0] for prompt in prompts_of(llm)]
        assert essence(results[name]) == essence(alone)
    places = [
        [[x.logprob for x in place.values()] for place in one.prompt_logprobs[1:]]
        for name in ("bf16", "fp32")
        for one in results[name][-1:]
    ]
    differences = np.abs(np.array(places[0])[:, 0] - np.array(places[1])[:, 0])
    assert 0 < differences.max() < 0.05


def test_the_library_takes_a_word(tied):
    assert LLM(tied, "int8").core.info.weights.startswith("int8 0.")
    assert LLM(tied).core.info.weights == "fp32 0.3 MiB; of the checkpoint"
    assert LLM(tied, "int4", config=Config(model=tied)).core.info.dtype == "int4"


def test_a_cache_for_weights_that_are_not_quantized_is_refused(tied, tmp_path):
    settings = Config(model=tied, weights=WeightsConfig(cache_dir=tmp_path))
    with pytest.raises(ConfigError, match=r"weights\.cache_dir .* keeps quantized weights; set"):
        LLM(tied, config=settings)


def test_info_says_what_is_kept(tied, capsys):
    assert main("info", [str(tied), "--quantize", "int4"]) == 0
    assert "int4 in groups of 128 0.0 MiB" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="got 'int5'"):
        main("info", [str(tied), "--quantize", "int5"])
    assert json.loads((tied / "config.json").read_text())["tie_word_embeddings"] is True
