"""The rows of which something is wanted, so that all that follows the last attention runs on them alone."""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        out_RM: Buffer,  # fp32, out
        x_TM: Buffer,  # fp32
        rows_R: Buffer,  # int32, each in 0..T-1
    ) -> None: ...


def check(out_RM: Buffer, x_TM: Buffer, rows_R: Buffer) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    _, M = expect("x", x_TM, None, None)
    (R,) = expect("rows", rows_R, None)
    expect("out", out_RM, R, M)
    expect_dtype("rows", rows_R, "int32")
    expect_dtype("x", x_TM, "float32")
    expect_dtype("out", out_RM, "float32")
