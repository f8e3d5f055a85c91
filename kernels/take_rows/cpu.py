"""Taking rows in C++."""

from collections.abc import Callable
from ctypes import Structure, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, pointer


class Args(Structure):
    """`cpu::TakeRowsArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("out", c_void_p),
        ("x", c_void_p),
        ("rows", c_void_p),
        ("R", c_int64),
        ("M", c_int64),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("take_rows", Args)

    def run(
        out_RM: Array,
        x_TM: Array,
        rows_R: Array,
    ) -> None:
        R, M = out_RM.shape
        call(Args(pointer(out_RM), pointer(x_TM), pointer(rows_R), R, M))

    return run
