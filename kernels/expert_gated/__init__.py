"""The first half of the experts' MLPs: out[t, k] = act(gate x + bias, up x + bias) of token t's k-th expert.

What `expert_linear` of the token's row and then `gated` make, in one: see these for the order of additions and for the
activations. `order` and `tiles` are `moe_assign`'s of these experts; they say how the work may be cut and change no result.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype, expect_weight_dtype
from vivace.kernels.gated import check_activation
from vivace.kernels.moe_assign import check_assignment


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        out_TKF: Buffer,  # fp32, out
        x_TM: Buffer,  # fp32
        experts_TK: Buffer,  # int32
        order_TK: Buffer,  # int32
        tiles_TK3: Buffer,  # int32
        gate_up_ENM: Buffer,  # fp32, bf16 or fp16; N = 2F rows, those of gate first
        bias_EN: Buffer | None = None,  # fp32
        *,
        activation: str = "silu",  # one of gated.ACTIVATIONS
        alpha: float = 1.702,
        limit: float = 7.0,
    ) -> None: ...


def check(
    out_TKF: Buffer,
    x_TM: Buffer,
    experts_TK: Buffer,
    order_TK: Buffer,
    tiles_TK3: Buffer,
    gate_up_ENM: Buffer,
    bias_EN: Buffer | None = None,
    *,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    T, K, F = expect("out", out_TKF, None, None, None)
    E, _, M = expect("gate_up", gate_up_ENM, None, 2 * F, None)
    expect("experts", experts_TK, T, K)
    expect("x", x_TM, T, M)
    expect_dtype("experts", experts_TK, "int32")
    expect_dtype("out", out_TKF, "float32")
    expect_dtype("x", x_TM, "float32")
    expect_weight_dtype("gate_up", gate_up_ENM, has_fp16=True)
    check_assignment(order_TK, tiles_TK3, T, K)
    if bias_EN is not None:
        expect("bias", bias_EN, E, 2 * F)
        expect_dtype("bias", bias_EN, "float32")
    check_activation(activation, limit)
