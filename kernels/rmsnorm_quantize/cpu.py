"""RMSNorm as bytes in C++."""

from collections.abc import Callable
from ctypes import Structure, c_void_p

from vivace.kernels.cpu.library import Array, Library, pointer
from vivace.kernels.rmsnorm.cpu import Args as RmsnormArgs


class Args(Structure):
    """`cpu::RmsnormQuantizeArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (("q", c_void_p), ("params", c_void_p), *RmsnormArgs._fields_)


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("rmsnorm_quantize", Args)

    def run(q_TM: Array, params_T2: Array, x_TM: Array, weight_M: Array, *, eps: float) -> None:
        outs = pointer(q_TM), pointer(params_T2), None
        call(Args(*outs, pointer(x_TM), pointer(weight_M), *x_TM.shape, eps))

    return run
