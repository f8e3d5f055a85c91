"""torch tensors on one device."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from vivace.kernels.buffer import SCALE_BYTES, DType
from vivace.kernels.quantized import Quantized

DTYPES = {
    DType.FP32: torch.float32,
    DType.FP16: torch.float16,
    DType.BF16: torch.bfloat16,
    DType.UINT8: torch.uint8,
    DType.INT32: torch.int32,
    DType.INT64: torch.int64,
}


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """See `kernels.quantized.Quantized`; on the device."""

    q: torch.Tensor
    scales: torch.Tensor
    group: int | None
    shape: tuple[int, ...]
    dtype: str

    def expert(self, e: int) -> "QuantizedTensor":
        """The matrix of one."""
        return QuantizedTensor(self.q[e], self.scales[e], self.group, self.shape[1:], self.dtype)


class TorchMemory:
    """See `kernels.memory.Memory`."""

    def __init__(self, device: str) -> None:
        self._device = torch.device(device)

    def empty(self, shape: tuple[int, ...], dtype: DType) -> torch.Tensor:
        """A new tensor, contents undefined."""
        return torch.empty(shape, dtype=DTYPES[dtype], device=self._device)

    def view(self, buffer: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
        """The first elements of a tensor, as `shape`."""
        count = 1
        for size in shape:
            count *= size
        return buffer.view(-1)[:count].view(shape)

    def upload(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        """A copy on the device; uint16 stands for bf16."""
        tensor = torch.tensor(array, device=self._device)
        return tensor.view(torch.bfloat16) if array.dtype == np.uint16 else tensor

    def pack(self, weight: Quantized) -> QuantizedTensor:
        """Its arrays on the device."""
        arrays = self.upload(weight.q), self.upload(weight.scales)
        return QuantizedTensor(*arrays, weight.group, weight.shape, weight.dtype)

    def read(self, buffer: torch.Tensor) -> np.ndarray[Any, Any]:
        """The contents on the host; waits for the device."""
        host = buffer.cpu()
        array: np.ndarray[Any, Any] = (
            host.view(torch.uint16) if host.dtype == torch.bfloat16 else host
        ).numpy()
        return array

    def kv_cache(
        self, num_blocks: int, block_tokens: int, num_kv_heads: int, head_dim: int, dtype: DType
    ) -> torch.Tensor:
        """[N, 2, S, G, D], zeroed."""
        is_int8 = dtype is DType.INT8
        width = head_dim + SCALE_BYTES if is_int8 else head_dim
        shape = (num_blocks, 2, block_tokens, num_kv_heads, width)
        kind = torch.int8 if is_int8 else DTYPES[dtype]
        return torch.zeros(shape, dtype=kind, device=self._device)
