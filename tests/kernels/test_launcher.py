"""What a launcher knows of its kernels: configs that were measured, scratch, and what would be compiled."""

import json

import pytest
import torch
import triton
import triton.language as tl

from vivace.kernels.backend import Backend, load
from vivace.kernels.compilation import CompiledAfterReady
from vivace.kernels.gpu import tuned
from vivace.kernels.gpu.launcher import Config, Launcher
from vivace.kernels.gpu.target import find_target

pytestmark = pytest.mark.triton
DEFAULT = Config({"BLOCK": 16})
OTHER = Config({"BLOCK": 32}, num_warps=8, num_stages=5)


@triton.jit(do_not_specialize=["T"])
def fill(
    out,  # [T, N] fp32
    T,
    N,
    BLOCK: tl.constexpr,
):
    n = tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0) * N + n, 1.0, mask=n < N)


def run(launcher, T, N, config=DEFAULT):
    launcher.launch(fill, (T,), (torch.empty(T, N), T, N), {}, config)


def test_launches_that_a_gpu_would_compile_once_are_one_variant():
    launcher = Launcher("cpu")
    for T in (1, 2, 16, 31):  # not specialized
        run(launcher, T, 5)
    [variant] = launcher.watch.variants
    assert str(variant) == ("kernels.fill BLOCK=16 warps=4 stages=2 (*torch.float32:16, i32, i32)")


def test_whole_numbers_that_are_1_or_divisible_by_16_are_variants_of_their_own():
    launcher = Launcher("cpu")
    for N in (1, 5, 7, 16, 32):
        run(launcher, 2, min(N, 16), DEFAULT)
    assert [one.arguments[-1] for one in launcher.watch.variants] == ["1", "i32", "i32:16"]


def test_another_config_is_another_variant():
    launcher = Launcher("cpu")
    run(launcher, 2, 5)
    run(launcher, 2, 5, OTHER)
    assert len(launcher.watch.variants) == 2


def test_a_variant_that_is_new_after_ready_is_counted_and_logged_once(caplog):
    launcher = Launcher("cpu")
    run(launcher, 2, 5)
    launcher.watch.seal(strict=False)
    run(launcher, 3, 7)
    assert launcher.watch.num_compiled_after_ready == 0 and not caplog.records
    for _ in range(2):
        run(launcher, 2, 16)
    assert launcher.watch.num_compiled_after_ready == 1
    [record] = caplog.records
    assert "after ready" in record.message and "kernels.fill BLOCK=16" in record.message


def test_strict_refuses_a_variant_that_is_new_after_ready():
    launcher = Launcher("cpu")
    launcher.watch.seal(strict=True)
    with pytest.raises(CompiledAfterReady, match=r"kernels\.fill"):
        run(launcher, 2, 5)


def test_scratch_grows_before_ready_and_is_reported_after():
    launcher = Launcher("cpu")
    launcher.scratch("sums", (4, 8), torch.float32)
    launcher.scratch("sums", (8, 8), torch.float32)
    launcher.watch.seal(strict=True)
    assert launcher.scratch("sums", (2, 32), torch.float32).shape == (2, 32)
    for name, shape, dtype in (
        ("sums", (65,), torch.float32),
        ("sums", (4,), torch.int32),
        ("other", (1,), torch.float32),
    ):
        with pytest.raises(CompiledAfterReady, match=f"scratch {name} must grow"):
            launcher.scratch(name, shape, dtype)


def test_the_ops_say_what_they_compile():
    ops = load(Backend.TRITON, device="cpu")
    assert ops.compilation is not None and ops.compilation.num_compiled_after_ready == 0
    assert load(Backend.REFERENCE).compilation is None


def test_where_kernels_are_interpreted_nothing_is_compiled():
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1 is set"):
        Launcher("meta", target=find_target("sm_90"))


def test_a_tuned_config_goes_before_the_default(tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    path = tuned.write("NVIDIA H200", triton.__version__, {"add": {"all": OTHER}})
    assert path.name == "nvidia-h200.json"
    launcher = Launcher("cpu", tuned_for="NVIDIA H200")
    assert launcher.config("add", "all", DEFAULT) == OTHER
    assert launcher.config("add", "few", DEFAULT) == DEFAULT
    assert launcher.config("gated", "all", DEFAULT) == DEFAULT
    assert Launcher("cpu", tuned_for="NVIDIA H100").config("add", "all", DEFAULT) == DEFAULT
    assert Launcher("cpu").config("add", "all", DEFAULT) == DEFAULT


def test_a_config_of_a_kernel_that_has_changed_is_not_used_and_said_so(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(tuned, "FOLDER", tmp_path)
    tuned.write("a", triton.__version__, {"add": {"all": Config({"BLOCK_N": 64})}})
    assert Launcher("cpu", tuned_for="a").config("add", "all", DEFAULT) == DEFAULT
    assert "tuned config of add all is of another kernel" in caplog.text


def test_configs_of_another_triton_are_not_used_and_said_so(tmp_path, caplog):
    tuned.write("a", "3.6.0", {"add": {"all": OTHER}}, tmp_path)
    assert tuned.read("a", "3.6.2", tmp_path) == {"add": {"all": OTHER}} and not caplog.records
    assert tuned.read("a", "3.7.1", tmp_path) == {}
    assert "a.json is of triton 3.6.0 and not used with 3.7.1" in caplog.text


def test_tuning_some_ops_keeps_what_is_known_of_the_others(tmp_path):
    tuned.write("a", "3.7.1", {"add": {"all": OTHER}, "gated": {"x": OTHER}}, tmp_path)
    tuned.write("a", "3.7.1", {"add": {"few": DEFAULT, "all": DEFAULT}}, tmp_path)
    assert tuned.read("a", "3.7.1", tmp_path) == {
        "add": {"all": DEFAULT, "few": DEFAULT},
        "gated": {"x": OTHER},
    }
    tuned.write("a", "3.8.0", {"add": {"few": OTHER}}, tmp_path)
    assert tuned.read("a", "3.8.0", tmp_path) == {"add": {"few": OTHER}}


def test_every_tuned_file_that_ships_can_be_read():
    for path in tuned.FOLDER.glob("*.json"):
        written = json.loads(path.read_text())
        assert tuned.file_of(written["device"]) == path
        assert tuned.read(written["device"], written["triton"])
