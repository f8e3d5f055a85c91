"""What an op may assume of a buffer, and the element types that buffers have."""

from enum import Enum
from functools import cache
from typing import Any, Protocol

SCALE_BYTES = 4  # behind a head of int8 in the KV cache


class DType(Enum):
    """Element types; NumPy has no name for bf16."""

    FP32 = "fp32"
    FP16 = "fp16"
    BF16 = "bf16"
    INT4 = "int4"  # with scales: see kernels/quantized.py
    INT8 = "int8"  # likewise
    UINT8 = "uint8"
    INT32 = "int32"
    INT64 = "int64"


def kv_head_bytes(head_dim: int, dtype: DType) -> int:
    """Of a token's keys, or values, of one head in the KV cache."""
    per_element = {DType.FP32: 4, DType.BF16: 2, DType.INT8: 1}[dtype]
    return per_element * head_dim + (SCALE_BYTES if dtype is DType.INT8 else 0)


class Buffer(Protocol):
    """A contiguous array on the backend's device. Ops write into buffers, they never allocate."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes, slowest first."""
        ...

    @property
    def dtype(self) -> Any:
        """The backend's own name of the element type."""
        ...


def expect(name: str, buffer: Buffer, *shape: int | None) -> tuple[int, ...]:
    """Return the buffer's shape. Raises ValueError, with both shapes, if it is not `shape` (None: any size)."""
    got = tuple(buffer.shape)
    if len(got) != len(shape) or any(
        want is not None and want != size for want, size in zip(shape, got, strict=True)
    ):
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} must be [{wanted}], got {list(got)}")
    return got


def expect_weight_dtype(name: str, buffer: Buffer, *, has_fp16: bool = False) -> None:
    """Raise ValueError unless the elements are fp32 or bf16, which on the CPU is uint16: NumPy has no name for it; or fp16."""
    dtype = str(buffer.dtype).removeprefix("torch.")
    if dtype not in ("float32", "bfloat16", "uint16") and not (has_fp16 and dtype == "float16"):
        kinds = "float32, float16 or bfloat16" if has_fp16 else "float32 or bfloat16"
        raise ValueError(f"{name} must hold {kinds} (uint16 on the CPU), got {buffer.dtype}")


def expect_bf16(name: str, buffer: Buffer) -> None:
    """Raise ValueError unless the elements are bf16, which on the CPU is uint16."""
    if _name(buffer.dtype) not in ("bfloat16", "uint16"):
        raise ValueError(f"{name} must hold bfloat16 (uint16 on the CPU), got {buffer.dtype}")


def expect_dtype(name: str, buffer: Buffer, dtype: str) -> None:
    """Raise ValueError unless the elements are of this type (`float32`, `uint8`, `int32`, `int64`)."""
    if _name(buffer.dtype) != dtype:
        raise ValueError(f"{name} must hold {dtype}, got {buffer.dtype}")


def expect_kv_cache(kv_cache: Buffer, num_kv_heads: int, head_dim: int) -> None:
    """Raise ValueError unless `kv_cache` is one of Memory.kv_cache for heads like these.

    Its last axis is a token's head: fp32 or bf16 (uint16 on the CPU), or int8 and the bytes of an fp32 scale.
    """
    dtype = _name(kv_cache.dtype)
    if dtype not in ("float32", "bfloat16", "uint16", "int8"):
        raise ValueError(f"kv_cache must hold float32, bfloat16 or int8, got {kv_cache.dtype}")
    width = head_dim + SCALE_BYTES if dtype == "int8" else head_dim
    expect("kv_cache", kv_cache, None, 2, None, None, width)
    if num_kv_heads not in kv_cache.shape[2:4]:
        raise ValueError(
            f"num_kv_heads ({num_kv_heads}) does not fit kv_cache {list(kv_cache.shape)}"
        )


@cache  # NumPy takes a microsecond to name a type, and a step samples with 18 arrays
def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
