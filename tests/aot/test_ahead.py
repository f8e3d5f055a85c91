"""Compiling without a GPU: what is judged, what is found again, what is counted."""

import shutil

import pytest
import torch

from tests.aot.kernels import double, matmul
from vivace.kernels.compilation import CompiledAfterReady
from vivace.kernels.gpu import ahead
from vivace.kernels.gpu.launcher import Config, Launcher
from vivace.kernels.gpu.target import TARGETS, find_target

pytestmark = pytest.mark.aot
GOOD = Config({"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64}, num_warps=8, num_stages=3)
SPILLING = Config({"BLOCK_M": 256, "BLOCK_N": 256, "BLOCK_K": 64}, num_warps=4, num_stages=2)
WIDE = Config({"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128}, num_warps=8, num_stages=4)
SMALL = Config({"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 32}, num_warps=1)


@pytest.fixture
def launcher_of(tmp_path):
    """Makes launchers that compile for a target into one folder; what Triton knows is given back after the test."""
    with ahead.knobs_kept():
        yield lambda target, folder=tmp_path: Launcher(
            "meta", target=find_target(target), cache_dir=folder
        )


def multiply(launcher, config, num_rows=300):
    x_MK = torch.empty(num_rows, 512, dtype=torch.bfloat16, device="meta")
    w_NK = torch.empty(512, 512, dtype=torch.bfloat16, device="meta")
    out_MN = torch.empty(num_rows, 512, device="meta")
    grid = -(-num_rows // config.tiles["BLOCK_M"]), 512 // config.tiles["BLOCK_N"]
    launcher.launch(matmul, grid, (out_MN, x_MK, w_NK, num_rows), {"N": 512, "K": 512}, config)


def double_of(launcher, size, first=0):
    x_N = torch.empty(first + size, device="meta")[first:]
    grid = (-(-size // 128),)
    config = Config({"BLOCK": 128})
    launcher.launch(double, grid, (torch.empty(size, device="meta"), x_N, size), {}, config)


@pytest.mark.parametrize("target", TARGETS)
def test_a_sound_kernel_passes_on_every_target(launcher_of, target):
    launcher = launcher_of(target)
    multiply(launcher, GOOD if target.startswith("sm") else SMALL)
    [(variant, problems)] = ahead.judge(launcher.watch, target).items()
    assert (variant.op, variant.kernel, problems) == ("aot", "matmul", [])


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
def test_a_kernel_that_spills_fails(launcher_of, target):
    launcher = launcher_of(target)
    multiply(launcher, SPILLING)
    [problems] = ahead.judge(launcher.watch, target).values()
    assert any("spills" in problem for problem in problems)


def test_a_kernel_that_shares_more_than_there_is_fails(launcher_of):
    launcher = launcher_of("sm_80")
    multiply(launcher, WIDE)
    [problems] = ahead.judge(launcher.watch, "sm_80").values()
    assert any("bytes shared of 166912" in problem for problem in problems)


@pytest.mark.parametrize(("target", "missing"), [("sm_80", "HMMA"), ("sm_90", "HGMMA")])
def test_a_kernel_without_the_instructions_that_it_means_fails(launcher_of, target, missing):
    launcher = launcher_of(target)
    multiply(launcher, SMALL if target == "sm_90" else GOOD)  # too few rows for a warp group
    [problems] = ahead.judge(launcher.watch, target).values()
    assert (f"no {missing}" in problems) == (target == "sm_90")


def test_a_second_launcher_finds_what_the_first_compiled(launcher_of):
    first = launcher_of("sm_90")
    multiply(first, SMALL, num_rows=1)
    multiply(first, SMALL, num_rows=300)  # of the sizes only, so the same
    assert first.watch.num_compiled == len(first.watch.variants) == 1
    second = launcher_of("sm_90")
    multiply(second, SMALL, num_rows=7)
    assert second.watch.num_compiled == 0 and second.watch.variants == first.watch.variants


def test_a_cache_can_be_moved(launcher_of, tmp_path):
    first = launcher_of("sm_90", tmp_path / "built")
    multiply(first, SMALL)
    shutil.move(tmp_path / "built", tmp_path / "shipped")
    second = launcher_of("sm_90", tmp_path / "shipped")
    multiply(second, SMALL)
    assert (first.watch.num_compiled, second.watch.num_compiled) == (1, 0)
    assert not (tmp_path / "built").exists()


def test_a_broken_cache_is_compiled_anew(launcher_of, tmp_path):
    multiply(launcher_of("sm_90"), SMALL)
    [binary] = tmp_path.rglob("matmul.cubin")
    binary.unlink()
    second = launcher_of("sm_90")
    multiply(second, SMALL)
    assert second.watch.num_compiled == 1 and binary.exists()


def test_each_target_has_a_folder_of_its_own(launcher_of, tmp_path):
    for target in ("sm_80", "sm_90"):
        launcher = launcher_of(target)
        multiply(launcher, SMALL)
        assert launcher.watch.num_compiled == 1
    assert sorted(path.name for path in tmp_path.glob("triton-*/*")) == ["cuda-80", "cuda-90"]


def test_sizes_and_addresses_that_differ_by_16_are_variants(launcher_of):
    launcher = launcher_of("sm_90")
    for size, first in ((1, 0), (48, 0), (64, 0), (50, 0), (48, 1), (48, 4)):
        double_of(launcher, size, first)
    assert launcher.watch.num_compiled == len(launcher.watch.variants) == 4


def test_what_is_compiled_after_ready_is_counted_and_logged(launcher_of, caplog):
    launcher = launcher_of("sm_90")
    double_of(launcher, 48)
    launcher.watch.seal(strict=False)
    double_of(launcher, 64)  # known
    assert launcher.watch.num_compiled_after_ready == 0 and not caplog.records
    double_of(launcher, 50)
    assert launcher.watch.num_compiled_after_ready == 1
    [record] = caplog.records
    assert record.levelname == "WARNING" and "aot.double BLOCK=128" in record.message


def test_what_is_found_after_ready_is_not_compiled(launcher_of):
    double_of(launcher_of("sm_90"), 48)
    second = launcher_of("sm_90")
    second.watch.seal(strict=True)
    double_of(second, 48)
    assert second.watch.num_compiled_after_ready == 0


def test_strict_refuses_to_compile_after_ready(launcher_of):
    launcher = launcher_of("sm_90")
    launcher.watch.seal(strict=True)
    with pytest.raises(CompiledAfterReady, match=r"aot\.double BLOCK=128 .*\*fp32:16"):
        double_of(launcher, 48)


def test_an_unknown_target_is_refused():
    with pytest.raises(ValueError, match=r"target must be one of sm_80, .*, got 'sm_70'"):
        find_target("sm_70")
