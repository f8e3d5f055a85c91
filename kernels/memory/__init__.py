"""Where buffers come from: the one place that allocates, before serving starts, and copies from and to the host."""

from typing import Any, Protocol

from vivace.kernels.buffer import Buffer, DType
from vivace.kernels.quantized import Quantized


class Memory(Protocol):
    """Buffers of one backend. Nothing here is an op; of it all, a step calls `view`, `upload` and `read`."""

    def empty(self, shape: tuple[int, ...], dtype: DType) -> Buffer:
        """A new buffer, contents undefined."""
        ...

    def view(self, buffer: Buffer, shape: tuple[int, ...]) -> Buffer:
        """The first elements of a buffer, as `shape`; shares its memory."""
        ...

    def upload(self, array: Any) -> Buffer:
        """A NumPy array on the device. May share memory with `array`, which must be contiguous."""
        ...

    def pack(self, weight: Quantized) -> Buffer:
        """A quantized matrix as the backend's ops read it: `.shape` is (N, K), or (E, N, K) of experts; `.dtype` is "int8" or
        "int4"."""
        ...

    def read(self, buffer: Buffer) -> Any:
        """A buffer's contents as a NumPy array; waits for the device. May share memory with the buffer."""
        ...

    def kv_cache(
        self, num_blocks: int, block_tokens: int, num_kv_heads: int, head_dim: int, dtype: DType
    ) -> Buffer:
        """One layer's cache, zeroed. Its layout is the backend's own: `rope_kv_write` and `kv_read` are the only doors.

        Whatever the layout, `.shape` is (N, 2, ...) with G, S, D in the backend's order.
        """
        ...
