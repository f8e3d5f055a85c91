"""One row per token out of its experts' rows: the sum over k, in order, of weights[t, k] * y[t, k].

Then the row of the shared expert is added, times sigmoid(shared_gate[t]) where there is a gate (Qwen2-MoE).
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        out_TM: Buffer,  # fp32, out
        y_TKM: Buffer,  # fp32
        weights_TK: Buffer,  # fp32
        shared_TM: Buffer | None = None,  # fp32
        shared_gate_T1: Buffer | None = None,  # fp32, before the sigmoid; only with `shared`
    ) -> None: ...


def check(
    out_TM: Buffer,
    y_TKM: Buffer,
    weights_TK: Buffer,
    shared_TM: Buffer | None = None,
    shared_gate_T1: Buffer | None = None,
) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    T, K, M = expect("y", y_TKM, None, None, None)
    expect("weights", weights_TK, T, K)
    expect("out", out_TM, T, M)
    for name, buffer in (("out", out_TM), ("y", y_TKM), ("weights", weights_TK)):
        expect_dtype(name, buffer, "float32")
    if shared_TM is not None:
        expect("shared", shared_TM, T, M)
        expect_dtype("shared", shared_TM, "float32")
    if shared_gate_T1 is not None:
        expect("shared_gate", shared_gate_T1, T, 1)
        expect_dtype("shared_gate", shared_gate_T1, "float32")
        if shared_TM is None:
            raise ValueError("shared_gate is given only with shared")
