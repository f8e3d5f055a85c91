"""NumPy arrays, aligned to cache lines."""

import mmap
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from vivace.kernels.buffer import SCALE_BYTES, DType
from vivace.kernels.cpu.library import Library
from vivace.kernels.quantized import Quantized

ALIGNMENT = 64
HUGE_BYTES = 2 << 20
DTYPES = {
    DType.FP32: np.float32,
    DType.FP16: np.float16,
    DType.BF16: np.uint16,
    DType.UINT8: np.uint8,
    DType.INT32: np.int32,
    DType.INT64: np.int64,
}

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A quantized matrix, or those of all experts, in the library's own layout (kernels/cpu/packed.h), which is the same for
    all instruction sets."""

    data: Array  # uint8
    shape: tuple[int, ...]  # N, K; or E, N, K
    group: int | None  # of int4; None: int8

    @property
    def dtype(self) -> str:
        """As ops know it."""
        return "int8" if self.group is None else "int4"


class CpuMemory:
    """See `kernels.memory.Memory`."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Array:
        """A new array, contents undefined, a large one in huge pages. Raises ValueError for a type that NumPy does not have."""
        if dtype not in DTYPES:
            raise ValueError(f"no array of {dtype.value} on the CPU")
        size = prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        if size >= HUGE_BYTES:  # of small pages, hundreds are taken while the first large step runs
            return huge(size).view(DTYPES[dtype]).reshape(shape)
        raw = np.empty(size + ALIGNMENT, np.uint8)
        start = -raw.__array_interface__["data"][0] % ALIGNMENT
        return raw[start : start + size].view(DTYPES[dtype]).reshape(shape)

    def view(self, buffer: Array, shape: tuple[int, ...]) -> Array:
        """The first elements of an array, as `shape`."""
        return buffer.reshape(-1)[: prod(shape)].reshape(shape)

    def upload(self, array: Array) -> Array:
        """The array itself."""
        return array

    def pack(self, weight: Quantized) -> PackedMatrix:
        """In huge pages, if the system gives any: 2 MiB pages are read up to half as fast again."""
        matrices = weight.experts()
        N, K = weight.shape[-2:]
        num_bytes = self._library.packed_bytes(N, K, weight.group)
        data = huge(len(matrices) * num_bytes)
        for e, matrix in enumerate(matrices):
            self._library.pack(data[e * num_bytes : (e + 1) * num_bytes], matrix)
        return PackedMatrix(data, weight.shape, weight.group)

    def packed(self, data: Array, shape: tuple[int, ...], group: int | None) -> PackedMatrix:
        """The packed matrix that lies in these bytes."""
        return PackedMatrix(data, shape, group)

    def round(
        self, out: Array, rows: Array, shape: tuple[int, int], group: int | None, *, first: int
    ) -> bool:
        """Write some rows of a packed matrix, fp32, to its bytes; see `Library.round`."""
        return self._library.round(out, rows, *shape, group, first=first)

    def read(self, buffer: Array) -> Array:
        """The array itself."""
        return buffer

    def kv_cache(
        self, num_blocks: int, block_tokens: int, num_kv_heads: int, head_dim: int, dtype: DType
    ) -> Array:
        """[N, 2, G, S, D], zeroed; in memory it is as kernels/cpu/kv.h says, that is taken when a block is first written."""
        width = head_dim + SCALE_BYTES if dtype is DType.INT8 else head_dim
        shape = (num_blocks, 2, num_kv_heads, block_tokens, width)
        kind = np.int8 if dtype is DType.INT8 else DTYPES[dtype]
        raw = huge(prod(shape) * np.dtype(kind).itemsize)
        return raw.view(kind).reshape(shape)


def huge(num_bytes: int) -> Array:
    """Zeros that begin at a huge page."""
    raw = mmap.mmap(-1, num_bytes + HUGE_BYTES, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without huge pages
        raw.madvise(mmap.MADV_HUGEPAGE)
    whole = np.frombuffer(raw, np.uint8)
    start = -whole.__array_interface__["data"][0] % HUGE_BYTES
    return whole[start : start + num_bytes]
