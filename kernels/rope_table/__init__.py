"""Cosines and sines of rotary position embedding for the tokens of a step, shared by its layers. arXiv:2104.09864.

Row t holds cos(angle) in its first half and sin(angle) in its second, times `scale` (YaRN's attention factor);
angle = fp32(position * inv_freq), one rounding, as Hugging Face has it. D here is the rotated part of a head,
0 for layers without rotation. Variants are tables to choose from by token (LongRoPE, arXiv:2402.13753: short and long).
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        cos_sin_TD: Buffer,  # fp32, out
        positions_T: Buffer,  # int32
        inv_freq: Buffer,  # fp32 [W variants, D/2]
        variants_T: Buffer | None = None,  # int32, 0..W-1; without it all tokens use row 0
        *,
        scale: float,
    ) -> None: ...


def check(
    cos_sin_TD: Buffer,
    positions_T: Buffer,
    inv_freq: Buffer,
    variants_T: Buffer | None = None,
    *,
    scale: float,
) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    W, half = expect("inv_freq", inv_freq, None, None)
    if W < 1:
        raise ValueError(f"inv_freq must have a row, got {list(inv_freq.shape)}")
    (T,) = expect("positions", positions_T, None)
    expect("cos_sin", cos_sin_TD, T, 2 * half)
    expect_dtype("positions", positions_T, "int32")
    expect_dtype("inv_freq", inv_freq, "float32")
    expect_dtype("cos_sin", cos_sin_TD, "float32")
    if variants_T is not None:
        expect("variants", variants_T, T)
        expect_dtype("variants", variants_T, "int32")
    if not scale > 0:
        raise ValueError(f"scale must be positive, got {scale}")
