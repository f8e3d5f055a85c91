"""Weights are rounded exactly, whatever they are read from, and kept for the next start as far as that can be trusted."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.architectures import MODELS
from tests.engine.models.test_load_memory import CASES, LEAST_BYTES, write_checkpoint
from tests.tiny_models import make_checkpoint
from vivace.engine.config import Config, WeightsConfig
from vivace.engine.errors import ArtifactError
from vivace.engine.models import packed_cache, packing, weights
from vivace.engine.models.decoder import emit
from vivace.engine.models.hf_config import read_spec
from vivace.engine.models.packing import Work
from vivace.engine.models.program import Kind, values_of
from vivace.engine.models.quantize import Quantize
from vivace.engine.plan import program_of
from vivace.kernels.backend import Backend, load
from vivace.kernels.quantized import quantize_int4, quantize_int8

OPS = load(Backend.CPU)
WAYS = {
    "int8": (Quantize.INT8, 128),
    "int4": (Quantize.INT4, 32),
    "int4-64": (Quantize.INT4, 64),  # of 96 inputs the last group has 32
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def program_and_weights(directory, way=WAYS["int8"], cache=None, threads=2):
    spec = read_spec(directory)
    kind, group = way
    program = program_of(
        Config(model=directory, weights=WeightsConfig(quantize=kind, group=group)), spec
    )
    work = Work(threads, cache, lambda done, total: None)
    found, how = packing.load(directory, program, spec.architecture, memory=OPS.memory, work=work)
    return program, found, how


def bytes_of(found):
    """Of arrays, and of packed matrices."""
    arrays = {k: one if isinstance(one, np.ndarray) else one.data for k, one in found.items()}
    return {name: array.tobytes() for name, array in arrays.items()}


def tensors_of(model):
    """No views of the file, which is then written over."""
    found = load_file(model / "model.safetensors")
    return {name: tensor.clone() for name, tensor in found.items()}


def start(directory, cache, way=WAYS["int8"]):
    """Where the weights came from; they must be those of the checkpoint."""
    _, found, origin = program_and_weights(directory, way, cache)
    _, want, _ = program_and_weights(directory, way)
    assert bytes_of(found) == bytes_of(want)
    return origin


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("source"), "qwen3", dtype=torch.bfloat16)


@pytest.fixture
def model(source, tmp_path):
    return shutil.copytree(source, tmp_path / "model")


@each_way
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "phi3", "qwen2-moe", "gpt-oss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_every_matrix_is_the_checkpoint_s_rounded_to_the_nearest(tmp_path, name, dtype, way):
    """Against NumPy on the whole matrix, joined by hand from what transformers wrote."""
    kind, overrides = MODELS[name]
    directory = make_checkpoint(tmp_path, kind, dtype=dtype, **overrides)
    program, found, _ = program_and_weights(directory, way)
    plain = emit(read_spec(directory))
    fp32 = weights.load(directory, plain, read_spec(directory).architecture, lambda a, b: None)
    matrices = 0
    for value in values_of(program):
        if value.kind is Kind.WEIGHT and value.is_quantized:
            whole = fp32[value.name]
            want = (
                quantize_int8(whole) if value.group is None else quantize_int4(whole, value.group)
            )
            assert np.array_equal(found[value.name].data, OPS.memory.pack(want).data), value.name
            matrices += 1
        elif value.kind is Kind.WEIGHT:
            assert np.array_equal(found[value.name], fp32[value.name])
    assert matrices >= 2 * 2 + 1


def test_the_number_of_threads_changes_no_byte(model):
    one, three = (program_and_weights(model, threads=n)[1] for n in (1, 3))
    assert bytes_of(one) == bytes_of(three)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@each_way
def test_a_number_that_is_none_is_refused_by_its_tensor(model, bad, way):
    tensors = tensors_of(model)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = bad
    save_file(tensors, model / "model.safetensors", {"format": "pt"})
    with pytest.raises(ArtifactError, match=r"layers\.1\.mlp\.up_proj.*not finite"):
        program_and_weights(model, way)


@each_way
def test_the_second_start_takes_what_the_first_one_kept(model, tmp_path, way):
    cache = tmp_path / "new" / "cache"
    first, second = (start(model, cache, way=way) for _ in range(2))
    [file] = cache.iterdir()
    assert first == f"rounded from the checkpoint, kept in {file}"
    assert f"{file}, " in second and second.endswith("in huge pages")


def test_each_way_and_each_folder_has_a_file_of_its_own(model, source, tmp_path):
    for folder in (model, source):
        for way in (*WAYS.values(), (Quantize.INT4, 128)):
            assert "kept in" in start(folder, tmp_path / "cache", way=way)
    assert len(list((tmp_path / "cache").iterdir())) == 8
    assert "huge pages" in start(model, tmp_path / "cache")


def test_the_folder_may_be_called_by_another_path(model, tmp_path, monkeypatch):
    start(model, tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(model)
    for path in (Path("model"), Path("model/../model"), Path("link")):
        assert "huge pages" in start(path, tmp_path / "cache")


def change_in_place(model):
    """One byte of the largest tensor, and all times put back that can be."""
    path = model / "model.safetensors"
    times = path.stat()
    with path.open("r+b") as file:
        file.seek(-77, os.SEEK_END)
        file.write(b"\x17")
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def put_others_in_its_place(model):
    change_in_place(model)
    path = model / "model.safetensors"
    shutil.copy2(path, f"{path}.new")
    Path(f"{path}.new").replace(path)


def with_a_layer_less(model):
    config = json.loads((model / "config.json").read_text())
    config["num_hidden_layers"] = 1
    config["layer_types"] = config["layer_types"][:1]
    (model / "config.json").write_text(json.dumps(config))
    tensors = tensors_of(model)
    save_file(
        {name: one for name, one in tensors.items() if "layers.1." not in name},
        model / "model.safetensors",
        {"format": "pt"},
    )


@pytest.mark.parametrize("change", [change_in_place, put_others_in_its_place, with_a_layer_less])
def test_a_checkpoint_that_changed_is_rounded_anew(model, tmp_path, change):
    cache = tmp_path / "cache"
    start(model, cache)
    time.sleep(0.02)  # the kernel's clock for files is a coarse one
    change(model)
    [file] = cache.iterdir()
    assert start(model, cache) == (
        f"rounded from the checkpoint, kept in {file} "
        f"({file.name}: it is stale: of another checkpoint, setting or version)"
    )
    assert "huge pages" in start(model, cache)


def test_samples_tell_what_no_time_tells(model, monkeypatch):
    """File systems of images give all files one time, and the same numbers to the same tree."""
    spec = read_spec(model)
    program = program_of(Config(model=model), spec)
    path, real = model / "model.safetensors", Path.stat
    frozen = path.stat()
    monkeypatch.setattr(
        Path, "stat", lambda self, **how: frozen if self == path else real(self, **how)
    )
    original, tensors = path.read_bytes(), tensors_of(model)
    before = packing.key_of(model, program, spec.architecture)
    save_file({k: v + 0.125 for k, v in tensors.items()}, path, {"format": "pt"})
    assert packing.key_of(model, program, spec.architecture) != before
    path.write_bytes(original)
    assert packing.key_of(model, program, spec.architecture) == before


def test_a_checkpoint_that_changes_while_it_is_read_is_not_kept(model, tmp_path, monkeypatch):
    whole = packing._round

    def late(*args, **kwargs):
        data = whole(*args, **kwargs)
        os.utime(model / "model.safetensors")
        return data

    monkeypatch.setattr(packing, "_round", late)
    *_, how = program_and_weights(model, cache=tmp_path / "cache")
    assert how == "rounded from the checkpoint, not kept: it changed meanwhile"
    assert not (tmp_path / "cache").exists()


def test_a_corrupt_file_is_written_anew(model, tmp_path):
    cache = tmp_path / "cache"
    start(model, cache)
    [file] = cache.iterdir()
    with file.open("r+b") as opened:
        opened.seek(packed_cache.PAGE + 100)
        opened.write(b"\x99\x98")
    assert f"kept in {file} ({file.name}: it is corrupt)" in start(model, cache)
    os.truncate(file, 3)
    assert f"kept in {file} ({file.name}: it is no file" in start(model, cache)
    assert "huge pages" in start(model, cache)


def test_a_folder_that_cannot_be_written_is_done_without(model, tmp_path):
    (tmp_path / "file").write_text("")
    assert "not kept in" in start(model, tmp_path / "file")
    assert "not kept in /proc/self: " in start(model, Path("/proc/self"))


def test_another_process_that_writes_is_left_alone(model, tmp_path):
    cache = tmp_path / "cache"
    words = [sys.executable, "-c", TWO, str(model), str(cache)]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [one.communicate()[0] for one in both]
    assert all(one.returncode == 0 for one in both)
    assert any("kept in" in one for one in said)
    assert "huge pages" in start(model, cache)
    assert len(list(cache.iterdir())) == 1


TWO = """
import sys
from pathlib import Path
from vivace import LLM
from vivace.engine.config import Config, WeightsConfig
model, cache = map(Path, sys.argv[1:])
config = Config(model=model, weights=WeightsConfig(cache_dir=cache))
print(LLM(model, "int8", config=config).core.info.weights)
"""
PEAK = """
import json, sys
from pathlib import Path
from vivace.engine.config import Config, WeightsConfig
from vivace.engine.models import packing
from vivace.engine.models.hf_config import read_spec
from vivace.engine.models.quantize import Quantize
from vivace.engine.plan import program_of
from vivace.kernels.backend import Backend, load

def status(name):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

directory, kind = Path(sys.argv[1]), Quantize(sys.argv[2])
spec = read_spec(directory)
program = program_of(Config(model=directory, weights=WeightsConfig(quantize=kind)), spec)
memory = load(Backend.CPU).memory
Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
before = status("VmRSS")
work = packing.Work(2, None, lambda done, total: None)
kept = packing.load(directory, program, spec.architecture, memory=memory, work=work)
print(json.dumps([status("VmHWM") - before, packing.arrange(program)[1]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("case", CASES)
def test_the_peak_of_rounding_is_little_more_than_what_is_kept(tmp_path, case, kind):
    config, dtype, shards = CASES[case]
    assert write_checkpoint(tmp_path, config, dtype, shards) >= LEAST_BYTES
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path), kind],
        capture_output=True,
        text=True,
        check=True,
    )
    grown, kept = json.loads(done.stdout)
    print(f"{grown - kept >> 20} MiB beside {kept >> 20}")
    assert grown <= kept + (100 << 20)
