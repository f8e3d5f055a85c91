"""Rotary tables on a GPU. Bound by its launch: 8 bytes and one fp64 sine and cosine for each pair, once a step."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Config, Launcher

DEFAULT = Config(num_warps=2)


@triton.jit
def _cos_sin(angle):
    """In fp64, to 1e-10, of angles to 1e8. The library's own reduce larger ones too, for which they need a stack."""
    turns = tl.floor(angle * 0.6366197723675814 + 0.5)
    # the first 33 bits of pi / 2, and the rest: fdlibm's reduction
    r = angle - turns * 1.57079632673412561417 - turns * 6.07710050650619224932e-11
    z = r * r
    sine = 2.7557313707070068e-6 + z * -2.5050760253406863e-8
    sine = r + r * z * (
        -1 / 6 + z * (8.33333333332248946e-3 + z * (-1.98412698298579493e-4 + z * sine))
    )
    cosine = -2.7557314351390663e-7 + z * 2.0875723212981748e-9
    cosine = 4.16666666666666019e-2 + z * (
        -1.38888888888741096e-3 + z * (2.48015872894767294e-5 + z * cosine)
    )
    cosine = 1.0 - 0.5 * z + z * z * cosine
    quarter = turns.to(tl.int64) & 3
    is_odd = (quarter & 1) == 1
    cos, sin = tl.where(is_odd, sine, cosine), tl.where(is_odd, cosine, sine)
    cos = tl.where((quarter == 1) | (quarter == 2), -cos, cos)
    return cos, tl.where(quarter >= 2, -sin, sin)


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
    cos, sin = _cos_sin(angle)
    out = cos_sin + t.to(tl.int64) * 2 * half + column
    tl.store(out, (cos * scale).to(tl.float32), mask=mask)
    tl.store(out + half, (sin * scale).to(tl.float32), mask=mask)


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
