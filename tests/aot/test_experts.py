"""The machine code of an MoE layer of Qwen3-30B-A3B's shape, at the number of tokens of each tile size."""

import pytest
import torch

from vivace.kernels.backend import bind_triton
from vivace.kernels.gpu import ahead, machine_code
from vivace.kernels.gpu.target import find_target
from vivace.kernels.moe_assign import tile_rows

pytestmark = pytest.mark.aot
E, K, M, F = 128, 8, 2048, 768


def layer(ops, T, dtype=torch.bfloat16):
    """Every op of it, on tensors without memory."""

    def empty(*shape, dtype=torch.float32):
        return torch.empty(shape, dtype=dtype, device="meta")

    x, act, y = empty(T, M), empty(T, K, F), empty(T, K, M)
    weights, loads = empty(T, K), empty(E, dtype=torch.int64)
    experts, order = (empty(T, K, dtype=torch.int32) for _ in range(2))
    tiles = empty(T, K, 3, dtype=torch.int32)
    gate_up, down = empty(E, 2 * F, M, dtype=dtype), empty(E, M, F, dtype=dtype)
    ops.moe_route(weights, experts, empty(T, E), loads, scoring="softmax", renormalize=True)
    ops.moe_assign(order, tiles, experts, num_experts=E)
    ops.expert_gated(act, x, experts, order, tiles, gate_up)
    ops.expert_down(y, act, experts, order, tiles, down)
    ops.moe_combine(empty(T, M), y, weights)


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_an_moe_layer_is_sound_machine_code(target, tmp_path):
    with ahead.compiling(target, tmp_path) as launcher:
        ops, watch = bind_triton(launcher), launcher.watch
        sizes = (1, 4, 8, 16, 256, 1024, 4096)
        assert {tile_rows(T * K, E) for T in sizes} == {1, 16, 64, 128}
        for T in sizes:
            layer(ops, T)
        assert {
            variant: found for variant, found in ahead.judge(watch, target).items() if found
        } == {}
        assert len(watch.variants) == 12
        for variant, kernel in watch.compiled.items():
            rows = dict(variant.constexprs).get("BLOCK_M", 0)
            if variant.op not in ("expert_gated", "expert_linear"):
                continue
            counts = machine_code.read(kernel, find_target(target)).counts
            product = "HGMMA" if target == "sm_90" and rows >= 64 else "HMMA"
            assert counts[product] and counts["16-byte loads"], variant


def test_fp32_experts_are_sound_machine_code(tmp_path):
    with ahead.compiling("sm_90", tmp_path) as launcher:
        ops, watch = bind_triton(launcher), launcher.watch
        for T in (1, 8, 1024, 4096):
            layer(ops, T, torch.float32)
        assert {
            variant: found for variant, found in ahead.judge(watch, "sm_90").items() if found
        } == {}


@pytest.mark.parametrize("target", ["sm_100", "gfx942"])
def test_it_compiles_elsewhere(target, tmp_path):
    with ahead.compiling(target, tmp_path) as launcher:
        for T in (8, 4096):
            layer(bind_triton(launcher), T)
        assert launcher.watch.num_compiled == 8
