"""Rotary tables on a GPU. Bound by its launch: 8 bytes and one fp64 sine and cosine for each pair, once a step."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Config, Launcher

DEFAULT = Config(num_warps=2)


@triton.jit
def _rope_table(
    cos_sin,  # fp32 [T, 2 * half]
    positions,  # int32 [T]
    inv_freq,  # fp32 [W, half]
    variants,  # int32 [T]; not read without HAS_VARIANTS
    scale,  # fp32
    half,
    HAS_VARIANTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    t = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    mask = column < half
    if HAS_VARIANTS:
        inv_freq += tl.load(variants + t).to(tl.int64) * half
    position = tl.load(positions + t).to(tl.float32)
    angle = (position * tl.load(inv_freq + column, mask=mask, other=0.0)).to(tl.float64)
    out = cos_sin + t.to(tl.int64) * 2 * half + column
    tl.store(out, (tl.cos(angle) * scale).to(tl.float32), mask=mask)
    tl.store(out + half, (tl.sin(angle) * scale).to(tl.float32), mask=mask)


def bind(launcher: Launcher) -> Callable[..., None]:
    config = launcher.config("rope_table", "all", DEFAULT)

    def run(
        cos_sin_TD: torch.Tensor,
        positions_T: torch.Tensor,
        inv_freq: torch.Tensor,
        variants_T: torch.Tensor | None = None,
        *,
        scale: float,
    ) -> None:
        """See `kernels.rope_table`."""
        T, half = len(cos_sin_TD), inv_freq.shape[1]
        if half == 0:
            return
        variants = positions_T if variants_T is None else variants_T
        args = (cos_sin_TD, positions_T, inv_freq, variants, scale, half)
        block = triton.next_power_of_2(half)
        constexprs = {"HAS_VARIANTS": variants_T is not None, "BLOCK": block}
        launcher.launch(_rope_table, (T,), args, constexprs, config)

    return run
