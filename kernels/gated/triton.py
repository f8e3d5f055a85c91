"""Gated activations on a GPU. Bound by bytes: 12 for each element of the output.

`exp` and `tanh` are our own: the hardware's exponential multiplies by log2(e) in fp32, which loses |x| * 2^-24.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Config, Launcher

DEFAULT = Config({"BLOCK": 1024})


@triton.jit
def exp(x):
    """e^x to 3 units in the last place, of x cut off at -87 and 87; NaN of NaN. fp32."""
    x = tl.where(x > 87.0, 87.0, tl.where(x < -87.0, -87.0, x))
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4  # Cody and Waite: the first product is exact
    return tl.exp2(r * 1.4426950408889634) * tl.exp2(n)


@triton.jit
def tanh(x):
    """To 4 units in the last place, near 0 too. fp32."""
    size = tl.abs(x)
    small = tl.where(size < 0.625, x, 0.0)
    square = small * small
    near = -5.70498872745e-3 * square + 2.06390887954e-2  # the polynomial of Cephes' tanhf
    near = near * square - 5.37397155531e-2
    near = near * square + 1.33314422036e-1
    near = near * square - 3.33332819422e-1
    near = near * square * small + small
    far = 1.0 - tl.div_rn(2.0, exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def activated(gate, up, alpha, limit, ACTIVATION: tl.constexpr):
    """act(gate) * up, in fp32; see `kernels.gated`. The MoE's epilogue as well."""
    if ACTIVATION == "clamped_swiglu":
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
        return gate * tl.div_rn(1.0, 1.0 + exp(-alpha * gate)) * (up + 1.0)
    if ACTIVATION == "silu":
        return tl.div_rn(gate, 1.0 + exp(-gate)) * up
    if ACTIVATION == "gelu":
        return gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * 0.5 * up
    inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
    return gate * (1.0 + tanh(inner)) * 0.5 * up


@triton.jit
def _gated(
    out,  # fp32 [rows, F]
    gate_up,  # fp32 [rows, 2F]
    alpha,  # fp32
    limit,  # fp32
    F,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < F
    row = tl.program_id(0).to(tl.int64) * F
    gate = tl.load(gate_up + 2 * row + column, mask=mask, other=0.0)
    up = tl.load(gate_up + 2 * row + F + column, mask=mask, other=0.0)
    tl.store(out + row + column, activated(gate, up, alpha, limit, ACTIVATION), mask=mask)


def bind(launcher: Launcher) -> Callable[..., None]:
    config = launcher.config("gated", "all", DEFAULT)

    def run(
        out: torch.Tensor,
        gate_up: torch.Tensor,
        *,
        activation: str = "silu",
        alpha: float = 1.702,
        limit: float = 7.0,
    ) -> None:
        """See `kernels.gated`."""
        F = out.shape[-1]
        grid = (out.numel() // max(F, 1), triton.cdiv(F, config.tiles["BLOCK"]))
        args = (out, gate_up, alpha, limit, F)
        launcher.launch(_gated, grid, args, {"ACTIVATION": activation}, config)

    return run
