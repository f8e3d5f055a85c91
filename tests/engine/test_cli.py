"""`vivace info`: what it says of checkpoints that can be served, and of those that cannot. `vivace config`."""

import json
import re
import subprocess
import sys
import tomllib

import pytest

from tests.architectures import MODELS
from tests.tiny_models import make_checkpoint
from vivace.engine import gpu_kernels, plan
from vivace.engine.cli import main
from vivace.engine.errors import ArtifactError, ConfigError


@pytest.fixture
def info(capsys):
    """Run the command; returns its status and its rows."""

    def info(directory):
        status = main("info", [str(directory)])
        lines = capsys.readouterr().out.splitlines()
        return status, {line[:14].strip(): line[14:] for line in lines}

    return info


def checkpoint_of(directory, model):
    kind, overrides = MODELS[model]
    return make_checkpoint(directory, kind, **overrides)


def test_a_model_with_windows_and_experts_is_described(info, tmp_path):
    status, rows = info(checkpoint_of(tmp_path, "qwen2-moe-window"))
    assert status == 0
    assert (rows["architecture"], rows["supported"]) == ("Qwen2MoeForCausalLM", "yes")
    assert rows["windows"] == "19 tokens in 1 of 3 layers, none in 2 of 3 layers"
    assert rows["experts"] == "64 of 8, 8 a token, one of 24 for all, in 3 of 3 layers"
    assert rows["KV cache"] == "768 bytes per token in fp32"  # 3 layers, K and V, 2 heads of 16
    assert "problem" not in rows


def test_parameters_are_counted_as_transformers_does_and_those_of_idle_experts_left_out(
    info, tmp_path
):
    from transformers import AutoModelForCausalLM

    directory = checkpoint_of(tmp_path, "gpt-oss")
    model = AutoModelForCausalLM.from_pretrained(directory)
    total = model.num_parameters()
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    _, rows = info(directory)
    assert rows["parameters"] == f"{total:,}, {total - experts // 2:,} of them for a token"


def test_an_architecture_that_is_not_supported_is_named_with_its_size(info, tmp_path):
    checkpoint_of(tmp_path, "qwen3")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["OtherLM"]}))
    status, rows = info(tmp_path)
    assert (status, rows["architecture"], rows["supported"]) == (1, "OtherLM", "no")
    assert "OtherLM is not supported; supported are Gemma2ForCausalLM" in rows["problem"]
    assert rows["tensors"].startswith("25 with 119,744 numbers in 0.5 MiB")


def test_quantized_weights_are_refused_by_their_method(info, tmp_path):
    checkpoint_of(tmp_path, "gpt-oss")
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    status, rows = info(tmp_path)
    assert (status, rows["supported"]) == (1, "no")
    assert "quantization_config: mxfp4 weights are not supported" in rows["problem"]


def test_a_checkpoint_that_lacks_a_tensor_is_a_problem(info, tmp_path):
    checkpoint_of(tmp_path, "olmo2")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    status, rows = info(tmp_path)
    assert (status, rows["supported"]) == (1, "yes")
    assert "lacks model.layers.2." in rows["problem"]
    (tmp_path / "model.safetensors").unlink()
    assert "neither model.safetensors nor" in info(tmp_path)[1]["problem"]


def test_a_machine_that_is_too_small_is_a_problem(info, tmp_path, monkeypatch):
    monkeypatch.setattr("vivace.engine.cli.read_machine", lambda: plan.Machine(1, 1000))
    status, rows = info(checkpoint_of(tmp_path, "gemma2"))
    assert (status, rows["supported"]) == (1, "yes")
    assert "not enough memory" in rows["problem"]


def test_what_is_no_checkpoint_is_an_error(tmp_path):
    with pytest.raises(ArtifactError, match="is not a folder"):
        main("info", [str(tmp_path / "nowhere")])
    with pytest.raises(ArtifactError, match=r"config\.json: cannot be read"):
        main("info", [str(tmp_path)])


def test_config_prints_the_tree_and_what_the_machine_makes_of_each_model(
    tmp_path, capsys, monkeypatch
):
    machine = plan.Machine(num_cpus=6, free_bytes=1 << 30)
    monkeypatch.setattr("vivace.engine.cli.read_machine", lambda device: machine)
    model = checkpoint_of(tmp_path / "qwen3", "qwen3")
    words = [str(model), str(model), "--name", "a", "--name", "b", "--max-context", "64"]
    assert main("config", words) == 0
    text = capsys.readouterr().out
    assert tomllib.loads(text)["models"] == {"a": str(model), "b": str(model)}
    assert text.count("#   plan: 3 threads, context 64 tokens") == 2
    assert text.count("#   KV cache 128 MiB: ") == 2
    assert text.count("#   weights fp32 0.5 MiB; working memory ") == 2
    (tmp_path / "printed.toml").write_text(text)
    assert main("config", ["--config", str(tmp_path / "printed.toml")]) == 0
    assert capsys.readouterr().out == text


def test_config_needs_no_model(capsys):
    assert main("config", ["--threads", "3"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["cpu"]["threads"] == 3


def test_config_ends_with_1_and_the_reason_where_a_model_cannot_be_served(tmp_path, capsys):
    model = checkpoint_of(tmp_path / "qwen3", "qwen3")
    bad = tmp_path / "bad"
    bad.mkdir()
    capsys.readouterr()
    assert main("config", [str(model), str(bad)]) == 1
    shown = capsys.readouterr()
    assert "#   plan: " in shown.out
    assert f"#   cannot be served: model 'bad': {bad}/config.json: cannot be read" in shown.out
    assert shown.err.startswith("vivace: error: model 'bad': ") and shown.err.count("\n") == 1
    with pytest.raises(ConfigError, match=r"not enough memory: .* of all models"):
        half = plan.read_machine().free_bytes * 3 // 5
        words = [str(model), str(model), "--name", "a", "--name", "b"]
        main("config", [*words, "--kv-memory", str(half)])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["list", "llama-9"], "llama-9 is neither a folder nor one of llama-3.2-1b, "),
        (["check", "--target", "sm_70"], "--target must be one of sm_80, .*, got 'sm_70'"),
        (["list", "--kv-cache-dtype", "fp8"], "kv_cache_dtype must be one of .*, got 'fp8'"),
    ],
)
def test_kernels_of_what_is_not_there_are_refused(words, message):
    with pytest.raises(ConfigError, match=message):
        main("kernels", words)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_are_for_the_cache_that_serving_has_unless_told(tmp_path, monkeypatch, dtype):
    asked = []
    monkeypatch.setattr(gpu_kernels, "show", lambda models, targets: asked.extend(models) or 0)
    checkpoint_of(tmp_path / "qwen3", "qwen3")
    path = tmp_path / "qwen3" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"torch_dtype": dtype}))
    for words in ([], ["--kv-cache-dtype", "int8", "--block-tokens", "16"]):
        assert main("kernels", ["list", str(path.parent), *words]) == 0
    got = [(one.kv_dtype.value, plan.block_tokens_of(one.config)) for one in asked]
    assert got == [("bf16" if dtype == "bfloat16" else "fp32", 64), ("int8", 16)]


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None
from vivace.__main__ import main
sys.exit(main())
"""


@pytest.mark.parametrize("command", ["kernels list", "config --device cuda"])
def test_what_needs_triton_says_what_to_install(command):
    words = [sys.executable, "-c", WITHOUT_TRITON, *command.split()]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.fullmatch(r"vivace: error: .*triton.*; install vivace\[gpu\]", done.stderr.strip())
