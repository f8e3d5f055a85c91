"""The gated activation of an MLP (`kernels.gated`), and its rows as bytes (`kernels.quantize`), with nothing in between kept.

The same bytes as the two ops give one after the other.
"""

from typing import Protocol

from vivace.kernels import gated
from vivace.kernels.buffer import Buffer, expect, expect_dtype
from vivace.kernels.quantized import MAX_INPUTS


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        q: Buffer,  # uint8 [T, F] or [T, k, F], out
        params: Buffer,  # fp32 [T, 2] or [T, k, 2], out: scale, zero
        gate_up: Buffer,  # fp32 [..., 2F], gate first
        *,
        activation: str = "silu",  # one of gated.ACTIVATIONS
        alpha: float = 1.702,
        limit: float = 7.0,
    ) -> None: ...


def check(
    q: Buffer,
    params: Buffer,
    gate_up: Buffer,
    *,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    *rows, F = expect("q", q, *((None,) * max(2, min(3, len(q.shape)))))
    if F > MAX_INPUTS:
        raise ValueError(f"q must have at most {MAX_INPUTS} columns, got {F}")
    expect("params", params, *rows, 2)
    expect("gate_up", gate_up, *rows, 2 * F)
    expect_dtype("q", q, "uint8")
    expect_dtype("params", params, "float32")
    expect_dtype("gate_up", gate_up, "float32")
    gated.check_activation(activation, limit)
