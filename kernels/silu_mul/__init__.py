"""The gated activation of an MLP: out = silu(gate) * up, gate and up side by side in a row. arXiv:2002.05202."""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        out_TF: Buffer,  # fp32, out
        gate_up_T2F: Buffer,  # fp32, gate first
    ) -> None: ...


def check(out_TF: Buffer, gate_up_T2F: Buffer) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    T, F = expect("out", out_TF, None, None)
    expect("gate_up", gate_up_T2F, T, 2 * F)
    expect_dtype("out", out_TF, "float32")
    expect_dtype("gate_up", gate_up_T2F, "float32")
