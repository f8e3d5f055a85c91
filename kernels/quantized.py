"""Weights as small whole numbers: round to nearest, and nothing cleverer. Backends lay them out by `Memory.pack`."""

from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from vivace.kernels.buffer import Buffer, expect, expect_dtype

Array = np.ndarray[Any, Any]

INT8_MOST = 127
INT4_LEAST, INT4_MOST = -8, 7
GROUPS = (32, 64, 128)
LAYOUT = (
    1  # of kernels/cpu/packed.h and of what is rounded how: a packed matrix of another is of no use
)
TILE = 32  # outputs that lie together
MAX_INPUTS = 1 << 16  # more of them, each at most 255 * 127, could overflow a sum of 32 bits


@dataclass(frozen=True, slots=True)
class Quantized:
    """A matrix [N, K], or one for each expert [E, N, K]: `q * scale`. int8: a scale for each row; int4: one for each group of a
    row, the last may be shorter.
    """

    q: Array  # int8 [N, K]
    scales: Array  # fp32 [N], or fp16 [N, groups]
    group: int | None = None  # of int4; None: int8

    @property
    def shape(self) -> tuple[int, ...]:
        """N, K; or E, N, K."""
        return tuple(self.q.shape)

    @property
    def dtype(self) -> str:
        """As ops know it."""
        return "int8" if self.group is None else "int4"

    def dequantized(self) -> Array:
        """What the numbers stand for, fp32, of the same shape."""
        if self.group is None:
            return self.q.astype(np.float32) * self.scales[..., None]
        of_inputs = np.repeat(self.scales.astype(np.float32), self.group, axis=-1)
        return self.q.astype(np.float32) * of_inputs[..., : self.q.shape[-1]]

    def experts(self) -> "list[Quantized]":
        """The matrix of each; of one without experts itself."""
        if self.q.ndim == 2:
            return [self]
        pairs = zip(self.q, self.scales, strict=True)
        return [Quantized(q, scales, self.group) for q, scales in pairs]


def packed_bytes(shape: tuple[int, ...], group: int | None) -> int:
    """Of a packed matrix, or of all experts', one behind the other, as kernels/cpu/packed.h has it."""
    *experts, N, K = shape
    num_tiles = -(-N // TILE)
    if group is None:
        return prod(experts) * num_tiles * TILE * (-(-K // 4) * 4 + 8)
    whole, rest = divmod(K, group)
    tail = (2 + -(-rest // 8) * 4) if rest else 0
    return prod(experts) * num_tiles * TILE * (whole * (2 + group // 2) + tail + 4)


def expect_expert_rows(
    out_TKN: Buffer,
    q: Buffer,
    params: Buffer,
    experts_TK: Buffer,
    weight_ENI: Buffer,
    bias_EN: Buffer | None,
) -> None:
    """Raise ValueError, with the shapes, unless these fit together: see `kernels.expert_linear_int8`."""
    E, N, width = expect("weight", weight_ENI, None, None, None)
    if width > MAX_INPUTS:
        raise ValueError(f"weight must have at most {MAX_INPUTS} inputs, got {width}")
    T, K = expect("experts", experts_TK, None, None)
    rows = (T, K) if len(q.shape) == 3 else (T,)
    expect("q", q, *rows, width)
    expect("params", params, *rows, 2)
    expect("out", out_TKN, T, K, N)
    expect_dtype("experts", experts_TK, "int32")
    expect_dtype("q", q, "uint8")
    expect_dtype("params", params, "float32")
    expect_dtype("out", out_TKN, "float32")
    if bias_EN is not None:
        expect("bias", bias_EN, E, N)
        expect_dtype("bias", bias_EN, "float32")


def quantize_int8(w: Array) -> Quantized:
    """Symmetric, a scale for each output: the largest magnitude becomes 127. w: [N, K] or [E, N, K]."""
    scales = np.abs(w).max(axis=-1, initial=0) / np.float32(INT8_MOST)
    scales = np.where(scales > 0, scales, 1).astype(np.float32)  # tiny ones come to 0 as well
    q = np.rint(w / scales[..., None])
    return Quantized(np.clip(q, -INT8_MOST, INT8_MOST).astype(np.int8), scales)


def quantize_int4(w: Array, group: int) -> Quantized:
    """Symmetric in groups of inputs: the number of the largest magnitude becomes -8, with its sign in the scale (Q4_0 of
    llama.cpp). Scales are fp16, and the numbers are rounded by what fp16 made of them. w: [N, K] or [E, N, K].
    """
    if group not in GROUPS:
        raise ValueError(f"group must be one of {', '.join(map(str, GROUPS))}, got {group}")
    *outputs, K = w.shape
    num_groups = -(-K // group)
    padded = np.zeros((*outputs, num_groups * group), np.float32)
    padded[..., :K] = w
    grouped = padded.reshape(*outputs, num_groups, group)
    place = np.abs(grouped).argmax(axis=-1)
    extreme = np.take_along_axis(grouped, place[..., None], axis=-1)
    scales = (extreme / np.float32(INT4_LEAST)).astype(np.float16)
    divisors = np.where(scales == 0, 1, scales).astype(np.float32)
    q = np.clip(np.rint(grouped / divisors), INT4_LEAST, INT4_MOST).astype(np.int8)
    q = np.ascontiguousarray(q.reshape(*outputs, -1)[..., :K])
    return Quantized(q, scales[..., 0], group)
