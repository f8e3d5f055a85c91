"""Weights as small whole numbers: round to nearest, and nothing cleverer. Backends lay them out by `Memory.pack`."""

from dataclasses import dataclass
from typing import Any

import numpy as np

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
    """A matrix [N, K]: `q * scale`. int8: a scale for each row; int4: one for each group of a row, the last may be shorter."""

    q: Array  # int8 [N, K]
    scales: Array  # fp32 [N], or fp16 [N, groups]
    group: int | None = None  # of int4; None: int8

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
        N, K = self.q.shape
        return N, K

    @property
    def dtype(self) -> str:
        """As ops know it."""
        return "int8" if self.group is None else "int4"

    def dequantized(self) -> Array:
        """What the numbers stand for, fp32 [N, K]."""
        if self.group is None:
            return self.q.astype(np.float32) * self.scales[:, None]
        of_inputs = np.repeat(self.scales.astype(np.float32), self.group, axis=1)
        return self.q.astype(np.float32) * of_inputs[:, : self.q.shape[1]]


def packed_bytes(N: int, K: int, group: int | None) -> int:
    """Of a packed matrix, as kernels/cpu/packed.h has it."""
    num_tiles = -(-N // TILE)
    if group is None:
        return num_tiles * TILE * (-(-K // 4) * 4 + 8)
    whole, rest = divmod(K, group)
    tail = (2 + -(-rest // 8) * 4) if rest else 0
    return num_tiles * TILE * (whole * (2 + group // 2) + tail + 4)


def quantize_int8(w_NK: Array) -> Quantized:
    """Symmetric, a scale for each output: the largest magnitude becomes 127."""
    scales = np.abs(w_NK).max(axis=1, initial=0) / np.float32(INT8_MOST)
    scales = np.where(scales > 0, scales, 1).astype(np.float32)  # tiny ones come to 0 as well
    q = np.rint(w_NK / scales[:, None])
    return Quantized(np.clip(q, -INT8_MOST, INT8_MOST).astype(np.int8), scales)


def quantize_int4(w_NK: Array, group: int) -> Quantized:
    """Symmetric in groups of inputs: the number of the largest magnitude becomes -8, with its sign in the scale (Q4_0 of
    llama.cpp). Scales are fp16, and the numbers are rounded by what fp16 made of them.
    """
    if group not in GROUPS:
        raise ValueError(f"group must be one of {', '.join(map(str, GROUPS))}, got {group}")
    N, K = w_NK.shape
    num_groups = -(-K // group)
    padded = np.zeros((N, num_groups * group), np.float32)
    padded[:, :K] = w_NK
    grouped = padded.reshape(N, num_groups, group)
    place = np.abs(grouped).argmax(axis=2)
    extreme = np.take_along_axis(grouped, place[:, :, None], axis=2)
    scales = (extreme / np.float32(INT4_LEAST)).astype(np.float16)
    divisors = np.where(scales == 0, 1, scales).astype(np.float32)
    q = np.clip(np.rint(grouped / divisors), INT4_LEAST, INT4_MOST).astype(np.int8)
    return Quantized(
        np.ascontiguousarray(q.reshape(N, -1)[:, :K]), scales.reshape(N, num_groups), group
    )
