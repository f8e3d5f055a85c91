"""Embedding in C++."""

from collections.abc import Callable
from ctypes import Structure, c_float, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, is_bf16, pointer


class Args(Structure):
    """`cpu::EmbedArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("out", c_void_p),
        ("tokens", c_void_p),
        ("table", c_void_p),
        ("T", c_int64),
        ("M", c_int64),
        ("is_bf16", c_int64),
        ("scale", c_float),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("embed", Args)

    def run(
        out_TM: Array,
        tokens_T: Array,
        table_VM: Array,
        *,
        scale: float = 1.0,
    ) -> None:
        T, M = out_TM.shape
        pointers = map(pointer, (out_TM, tokens_T, table_VM))
        call(Args(*pointers, T, M, is_bf16(table_VM), scale))

    return run
