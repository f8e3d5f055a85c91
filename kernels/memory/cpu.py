"""NumPy arrays, aligned to cache lines."""

from math import prod
from typing import Any

import numpy as np

from vivace.kernels.buffer import DType

ALIGNMENT = 64
DTYPES = {
    DType.FP32: np.float32,
    DType.FP16: np.float16,
    DType.INT8: np.int8,
    DType.UINT8: np.uint8,
    DType.INT32: np.int32,
    DType.INT64: np.int64,
}

Array = np.ndarray[Any, Any]


class CpuMemory:
    """See `kernels.memory.Memory`."""

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Array:
        """A new array, contents undefined. Raises ValueError for a type that NumPy does not have."""
        if dtype not in DTYPES:
            raise ValueError(f"no array of {dtype.value} on the CPU")
        size = prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        raw = np.empty(size + ALIGNMENT, np.uint8)
        start = -raw.__array_interface__["data"][0] % ALIGNMENT
        return raw[start : start + size].view(DTYPES[dtype]).reshape(shape)

    def view(self, buffer: Array, shape: tuple[int, ...]) -> Array:
        """The first elements of a one-dimensional array, as `shape`."""
        return buffer[: prod(shape)].reshape(shape)

    def upload(self, array: Array) -> Array:
        """The array itself."""
        return array

    def read(self, buffer: Array) -> Array:
        """The array itself."""
        return buffer

    def kv_cache(
        self, num_blocks: int, block_tokens: int, num_kv_heads: int, head_dim: int, dtype: DType
    ) -> Array:
        """[N, 2, G, S, D], zeroed; memory is taken when a block is first written."""
        return np.zeros((num_blocks, 2, num_kv_heads, block_tokens, head_dim), DTYPES[dtype])
