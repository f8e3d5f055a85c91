"""torch tensors on one device, as the Triton kernels want them."""

from typing import Any

import numpy as np
import torch

from vivace.kernels.buffer import SCALE_BYTES, DType
from vivace.kernels.memory.reference import DTYPES, TorchMemory
from vivace.kernels.quantized import Quantized


class TritonMemory:
    """See `kernels.memory.Memory`."""

    def __init__(self, device: torch.device) -> None:
        self._torch = TorchMemory(str(device))
        self._device = device

    def empty(self, shape: tuple[int, ...], dtype: DType) -> torch.Tensor:
        """A new tensor, contents undefined."""
        return self._torch.empty(shape, dtype)

    def view(self, buffer: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The first elements of a tensor, as `shape`."""
        return self._torch.view(buffer, shape)

    def upload(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """A copy on the device; uint16 stands for bf16."""
        if self._device.type == "meta":  # of what is compiled only, where weights may lie nowhere
            small = self._torch.upload(np.zeros(0, array.dtype))
            return small.new_empty(array.shape)
        return self._torch.upload(array)

    def pack(self, weight: Quantized) -> Any:
        """Refused with ValueError: this backend has no quantized ops."""
        raise ValueError(f"backend 'triton' cannot run {weight.dtype} weights")

    def read(self, buffer: torch.Tensor) -> np.ndarray[Any, Any]:
        """The contents on the host; waits for the device."""
        if self._device.type == "meta":
            buffer = torch.zeros_like(buffer, device="cpu")
        return self._torch.read(buffer)

    def kv_cache(
        self, num_blocks: int, block_tokens: int, num_kv_heads: int, head_dim: int, dtype: DType
    ) -> torch.Tensor:
        """[N, 2, G, S, D], zeroed: K or V of a block and head is one contiguous box."""
        is_int8 = dtype is DType.INT8
        width = head_dim + SCALE_BYTES if is_int8 else head_dim
        shape = (num_blocks, 2, num_kv_heads, block_tokens, width)
        kind = torch.int8 if is_int8 else DTYPES[dtype]
        return torch.zeros(shape, dtype=kind, device=self._device)
