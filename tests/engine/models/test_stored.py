"""Matrices that a checkpoint has in bf16 are kept so; the numbers, and all that is computed of them, are those of fp32."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.architectures import MODELS
from tests.engine.generation import SAMPLED, config, essence, prompts_of
from tests.tiny_models import make_checkpoint
from vivace import LLM
from vivace.engine.models import weights
from vivace.engine.models.decoder import emit
from vivace.engine.models.hf_config import read_spec
from vivace.engine.models.program import Kind, values_of, weight_bytes
from vivace.engine.models.weights import as_stored
from vivace.kernels.backend import Backend
from vivace.kernels.buffer import DType

NAMES = (
    "qwen3",
    "gemma2",
    "phi3",
    "qwen2-moe",
    "gpt-oss",
)  # norms plus 1, fused, gates, transposed experts
MATRICES = ("embed", "lm_head", ".qkv", ".out", ".gate_up", ".down", ".router", ".shared.gate")


@pytest.fixture(scope="module", params=NAMES)
def directory(request, tmp_path_factory):
    kind, overrides = MODELS[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(folder, kind, dtype=torch.bfloat16, **overrides)


@pytest.fixture(scope="module")
def wide(directory):
    """The same numbers in fp32."""
    copy = directory.with_name(f"{directory.name}-fp32")
    copy.mkdir()
    for file in directory.glob("*.json"):
        (copy / file.name).write_bytes(file.read_bytes())
    tensors = {
        name: one.float() for name, one in load_file(directory / "model.safetensors").items()
    }
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    return copy


def stored(directory):
    spec = read_spec(directory)
    return as_stored(directory, emit(spec), spec.architecture)


def weights_of(directory):
    program, spec = stored(directory), read_spec(directory)
    found = weights.load(directory, program, spec.architecture, lambda done, total: None)
    return {value: found[value.name] for value in values_of(program) if value.kind is Kind.WEIGHT}


def test_matrices_are_kept_as_they_are_and_the_rest_in_fp32(directory, wide):
    as_fp32 = {value.name: array for value, array in weights_of(wide).items()}
    kept = weights_of(directory)
    assert kept.keys() and {value.dtype for value in weights_of(wide)} == {DType.FP32}
    for value, array in kept.items():
        is_matrix = value.name.endswith(MATRICES)
        assert value.dtype is (DType.BF16 if is_matrix else DType.FP32), value.name
        assert array.nbytes == weight_bytes(value)
        bits = array.astype(np.uint32) << 16 if is_matrix else array.view(np.uint32)
        assert np.array_equal(bits, as_fp32[value.name].view(np.uint32)), value.name


@pytest.mark.parametrize("threads", [1, 2])
def test_tokens_and_logprobs_have_the_bits_of_fp32(directory, wide, threads):
    small = LLM(directory, config=config(directory, threads=threads))
    large = LLM(wide, config=config(wide, threads=threads))
    assert (small.core.info.dtype, large.core.info.dtype) == ("bf16", "fp32")
    assert small.core.info.weights.startswith("bf16 ")
    want = essence(large.generate(prompts_of(large), SAMPLED))
    assert essence(small.generate(prompts_of(small), SAMPLED)) == want


def test_the_reference_takes_them_too(directory, wide):
    params = replace(SAMPLED, temperature=0, max_tokens=4, logprobs=None, prompt_logprobs=None)
    one, two = (
        LLM(folder, config=config(folder, backend=Backend.REFERENCE))
        for folder in (directory, wide)
    )
    tokens = [
        [result.outputs[0].token_ids for result in llm.generate(prompts_of(llm), params)]
        for llm in (one, two)
    ]
    assert tokens[0] == tokens[1]


def test_a_matrix_of_two_types_and_one_of_fp16_are_made_fp32(tmp_path):
    make_checkpoint(tmp_path, "qwen3", dtype=torch.bfloat16)
    file = tmp_path / "model.safetensors"
    tensors = {name: one.clone() for name, one in load_file(file).items()}
    for name, dtype in (("self_attn.q_proj", torch.float32), ("mlp.down_proj", torch.float16)):
        tensors[f"model.layers.0.{name}.weight"] = tensors[f"model.layers.0.{name}.weight"].to(
            dtype
        )
    save_file(tensors, file, {"format": "pt"})
    kinds = {value.name: value.dtype for value in weights_of(tmp_path)}
    assert kinds["layers.0.attention.qkv"] is kinds["layers.0.mlp.down"] is DType.FP32
    assert kinds["layers.1.attention.qkv"] is kinds["layers.1.mlp.down"] is DType.BF16


def test_a_checkpoint_that_cannot_be_read_changes_nothing(tmp_path):
    make_checkpoint(tmp_path, "qwen3", dtype=torch.bfloat16)
    (tmp_path / "model.safetensors").write_bytes(b"no")
    program = emit(read_spec(tmp_path))
    assert as_stored(tmp_path, program, "Qwen3ForCausalLM") is program
