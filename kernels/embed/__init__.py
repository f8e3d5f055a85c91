"""Rows of the embedding table, one per token, times `scale` (Gemma: the root of the model size).

Token ids outside 0..V-1 are the caller's bug: undefined.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype, expect_weight_dtype


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        out_TM: Buffer,  # fp32, out
        tokens_T: Buffer,  # int32
        table_VM: Buffer,  # fp32 or bf16
        *,
        scale: float = 1.0,
    ) -> None: ...


def check(out_TM: Buffer, tokens_T: Buffer, table_VM: Buffer, *, scale: float = 1.0) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    _, M = expect("table", table_VM, None, None)
    (T,) = expect("tokens", tokens_T, None)
    expect("out", out_TM, T, M)
    expect_dtype("tokens", tokens_T, "int32")
    expect_weight_dtype("table", table_VM)
    expect_dtype("out", out_TM, "float32")
