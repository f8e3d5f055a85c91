"""The joining of experts' rows in C++."""

from collections.abc import Callable
from ctypes import Structure, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, optional_pointer, pointer


class Args(Structure):
    """`cpu::MoeCombineArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("out", c_void_p),
        ("y", c_void_p),
        ("weights", c_void_p),
        ("shared", c_void_p),
        ("shared_gate", c_void_p),
        ("T", c_int64),
        ("K", c_int64),
        ("M", c_int64),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("moe_combine", Args)

    def run(
        out_TM: Array,
        y_TKM: Array,
        weights_TK: Array,
        shared_TM: Array | None = None,
        shared_gate_T1: Array | None = None,
    ) -> None:
        pointers = map(pointer, (out_TM, y_TKM, weights_TK))
        optional = map(optional_pointer, (shared_TM, shared_gate_T1))
        call(Args(*pointers, *optional, *y_TKM.shape))

    return run
