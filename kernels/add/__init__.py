"""out = x + residual, element by element: where a residual is added and no norm follows at once."""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        out: Buffer,  # fp32, out; any shape
        x: Buffer,  # fp32
        residual: Buffer,  # fp32
    ) -> None: ...


def check(out: Buffer, x: Buffer, residual: Buffer) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    expect("residual", residual, *x.shape)
    expect("out", out, *x.shape)
    for name, buffer in (("out", out), ("x", x), ("residual", residual)):
        expect_dtype(name, buffer, "float32")
