"""The residual add and its norm as bytes in C++."""

from collections.abc import Callable
from ctypes import Structure, c_void_p

from vivace.kernels.add_rmsnorm.cpu import Args as AddRmsnormArgs
from vivace.kernels.cpu.library import Array, Library, pointer


class Args(Structure):
    """`cpu::AddRmsnormQuantizeArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (("q", c_void_p), ("params", c_void_p), *AddRmsnormArgs._fields_)


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("add_rmsnorm_quantize", Args)

    def run(
        sum_TM: Array,
        q_TM: Array,
        params_T2: Array,
        x_TM: Array,
        residual_TM: Array,
        weight_M: Array,
        *,
        eps: float,
    ) -> None:
        outs = pointer(q_TM), pointer(params_T2), pointer(sum_TM), None
        ins = map(pointer, (x_TM, residual_TM, weight_M))
        call(Args(*outs, *ins, *x_TM.shape, eps))

    return run
