"""Attention over the paged cache in C++."""

from collections.abc import Callable
from ctypes import Structure, c_float, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, kv_type, optional_pointer, pointer

MAX_HEAD_DIM = 1024  # the size of arrays on the stack in C++


class Args(Structure):
    """`cpu::AttentionArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("out", c_void_p),
        ("q", c_void_p),
        ("kv_cache", c_void_p),
        ("block_tables", c_void_p),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("sinks", c_void_p),
        ("selected", c_void_p),
        ("num_selected", c_void_p),
        ("T", c_int64),
        ("H", c_int64),
        ("G", c_int64),
        ("S", c_int64),
        ("D", c_int64),
        ("B", c_int64),
        ("X", c_int64),
        ("window", c_int64),
        ("kv_type", c_int64),
        ("scale", c_float),
        ("softcap", c_float),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("attention", Args)

    def run(
        out_THD: Array,
        q_THD: Array,
        kv_cache: Array,
        block_tables_BX: Array,
        query_starts: Array,
        context_lens_B: Array,
        sinks_H: Array | None = None,
        selected_BGXZ: Array | None = None,
        num_selected_BG: Array | None = None,
        *,
        num_kv_heads: int,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
    ) -> None:
        T, H, D = q_THD.shape
        if D > MAX_HEAD_DIM:
            raise ValueError(f"head size must be at most {MAX_HEAD_DIM}, got {D}")
        B, X = block_tables_BX.shape
        pointers = map(
            pointer, (out_THD, q_THD, kv_cache, block_tables_BX, query_starts, context_lens_B)
        )
        optional = map(optional_pointer, (sinks_H, selected_BGXZ, num_selected_BG))
        sizes = (T, H, num_kv_heads, kv_cache.shape[3], D, B, X)
        call(
            Args(
                *pointers,
                *optional,
                *sizes,
                window,
                kv_type(kv_cache),
                scale,
                softcap,
            )
        )

    return run
