"""Norm, rotation and the cache's writing in C++."""

from collections.abc import Callable
from ctypes import Structure, c_float, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, kv_type, optional_pointer, pointer

MAX_HEAD_DIM = 1024  # the size of arrays on the stack in C++


class Args(Structure):
    """`cpu::RopeKvWriteArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("q", c_void_p),
        ("kv_cache", c_void_p),
        ("qkv", c_void_p),
        ("cos_sin", c_void_p),
        ("slots", c_void_p),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("T", c_int64),
        ("H", c_int64),
        ("G", c_int64),
        ("S", c_int64),
        ("D", c_int64),
        ("R", c_int64),
        ("is_row_norm", c_int64),
        ("kv_type", c_int64),
        ("eps", c_float),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("rope_kv_write", Args)

    def run(
        q_THD: Array,
        kv_cache: Array,
        qkv_TX: Array,
        cos_sin_TR: Array,
        slots_T: Array,
        q_norm: Array | None = None,
        k_norm: Array | None = None,
        *,
        num_kv_heads: int,
        eps: float,
    ) -> None:
        T, H, D = q_THD.shape
        if D > MAX_HEAD_DIM:
            raise ValueError(f"head size must be at most {MAX_HEAD_DIM}, got {D}")
        S, R = kv_cache.shape[3], cos_sin_TR.shape[1]
        pointers = map(pointer, (q_THD, kv_cache, qkv_TX, cos_sin_TR, slots_T))
        norms = map(optional_pointer, (q_norm, k_norm))
        is_row_norm = q_norm is not None and len(q_norm) != D
        call(
            Args(
                *pointers, *norms, T, H, num_kv_heads, S, D, R, is_row_norm, kv_type(kv_cache), eps
            )
        )

    return run
