"""The residual add and its norm in C++."""

from collections.abc import Callable
from ctypes import Structure, c_float, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, pointer


class Args(Structure):
    """`cpu::AddRmsnormArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("sum", c_void_p),
        ("out", c_void_p),
        ("x", c_void_p),
        ("residual", c_void_p),
        ("weight", c_void_p),
        ("T", c_int64),
        ("M", c_int64),
        ("eps", c_float),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("add_rmsnorm", Args)

    def run(
        sum_TM: Array,
        out_TM: Array,
        x_TM: Array,
        residual_TM: Array,
        weight_M: Array,
        *,
        eps: float,
    ) -> None:
        T, M = x_TM.shape
        pointers = map(pointer, (sum_TM, out_TM, x_TM, residual_TM, weight_M))
        call(Args(*pointers, T, M, eps))

    return run
