"""The gated activation in C++."""

from collections.abc import Callable
from ctypes import Structure, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, pointer


class Args(Structure):
    """`cpu::SiluMulArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("out", c_void_p),
        ("gate_up", c_void_p),
        ("T", c_int64),
        ("F", c_int64),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("silu_mul", Args)

    def run(
        out_TF: Array,
        gate_up_T2F: Array,
    ) -> None:
        T, F = out_TF.shape
        call(Args(pointer(out_TF), pointer(gate_up_T2F), T, F))

    return run
