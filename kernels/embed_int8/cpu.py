"""int8 embedding in C++."""

from collections.abc import Callable
from ctypes import Structure, c_float, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, pointer
from vivace.kernels.memory.cpu import PackedMatrix


class Args(Structure):
    """`cpu::EmbedInt8Args` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("out", c_void_p),
        ("tokens", c_void_p),
        ("table", c_void_p),
        ("T", c_int64),
        ("M", c_int64),
        ("V", c_int64),
        ("scale", c_float),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("embed_int8", Args)

    def run(
        out_TM: Array,
        tokens_T: Array,
        table_VM: PackedMatrix,
        *,
        scale: float = 1.0,
    ) -> None:
        V, M = table_VM.shape
        arrays = (out_TM, tokens_T, table_VM.data)
        call(Args(*map(pointer, arrays), len(tokens_T), M, V, scale))

    return run
