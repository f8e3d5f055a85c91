"""`vivace kernels` and `make gpu-tune`, on a machine without a GPU."""

import sys

import pytest

from tests.architectures import MODELS
from tests.gpu import tune
from tests.tiny_models import make_checkpoint
from vivace.engine.cli import main

pytestmark = pytest.mark.aot


def test_list_prints_every_variant_and_its_targets(capsys):
    assert main("kernels", ["list", "llama-3.2-1b"]) == 0
    *variants, on_80, _, on_100, on_gfx = capsys.readouterr().out.splitlines()
    norm = [line for line in variants if line.startswith("rmsnorm.")]
    assert len(norm) == 1 and norm[0].endswith("on sm_80, sm_90, sm_100, gfx942")
    num_80 = sum(" sm_80," in line for line in variants)
    assert on_80 == f"sm_80: {num_80} variants" and on_gfx.startswith("gfx942: ")
    assert 5 < num_80 <= len(variants) and on_100.startswith("sm_100: ")


def test_build_compiles_once_for_a_folder_without_weights(capsys, tmp_path):
    kind, overrides = MODELS["llama-bf16"]
    model = make_checkpoint(tmp_path / "model", kind, **overrides)
    for weights in model.glob("*.safetensors"):
        weights.unlink()
    words = ["build", str(model), "--target", "sm_80", "--cache-dir", str(tmp_path / "kernels")]
    lines = []
    for _ in range(2):
        assert main("kernels", words) == 0
        lines.append(capsys.readouterr().out.split())
    num_variants = lines[0][2]
    assert lines[0][1:7] == ["compiled", num_variants, "variants,", "found", "0,", "in"]
    assert lines[1][1:7] == ["compiled", "0", "variants,", "found", f"{num_variants},", "in"]
    assert int(num_variants) > 5


def test_what_tuning_would_measure_can_be_asked_without_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tune.py", "--dry-run", "--model", "qwen3-30b-a3b"])
    assert tune.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("moe_combine any: 8 candidates, ") for line in lines)
