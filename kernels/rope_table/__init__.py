"""Cosines and sines of rotary position embedding for the tokens of a step, shared by its layers. arXiv:2104.09864.

Row t holds cos(angle) in its first half and sin(angle) in its second, times `scale` (YaRN's attention factor);
angle = fp32(position * inv_freq), one rounding, as Hugging Face has it. D here is the rotated part of a head.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        cos_sin_TD: Buffer,  # fp32, out
        positions_T: Buffer,  # int32
        inv_freq: Buffer,  # fp32 [D/2]
        *,
        scale: float,
    ) -> None: ...


def check(cos_sin_TD: Buffer, positions_T: Buffer, inv_freq: Buffer, *, scale: float) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    (half,) = expect("inv_freq", inv_freq, None)
    (T,) = expect("positions", positions_T, None)
    expect("cos_sin", cos_sin_TD, T, 2 * half)
    expect_dtype("positions", positions_T, "int32")
    expect_dtype("inv_freq", inv_freq, "float32")
    expect_dtype("cos_sin", cos_sin_TD, "float32")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
