"""RMSNorm in C++."""

from collections.abc import Callable
from ctypes import Structure, c_float, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, pointer


class Args(Structure):
    """`cpu::RmsnormArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("out", c_void_p),
        ("x", c_void_p),
        ("weight", c_void_p),
        ("T", c_int64),
        ("M", c_int64),
        ("eps", c_float),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("rmsnorm", Args)

    def run(
        out_TM: Array,
        x_TM: Array,
        weight_M: Array,
        *,
        eps: float,
    ) -> None:
        T, M = x_TM.shape
        call(Args(pointer(out_TM), pointer(x_TM), pointer(weight_M), T, M, eps))

    return run
