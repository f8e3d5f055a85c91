"""Logits kept within a bound, smoothly: out = cap * tanh(x / cap), as Gemma 2 does. arXiv:2408.00118, section 2."""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        out_TV: Buffer,  # fp32, out
        x_TV: Buffer,  # fp32
        *,
        cap: float,
    ) -> None: ...


def check(out_TV: Buffer, x_TV: Buffer, *, cap: float) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    expect("x", x_TV, None, None)
    expect("out", out_TV, *x_TV.shape)
    expect_dtype("x", x_TV, "float32")
    expect_dtype("out", out_TV, "float32")
    if not cap > 0:
        raise ValueError(f"cap must be positive, got {cap}")
