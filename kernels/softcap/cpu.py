"""Soft caps in C++."""

from collections.abc import Callable
from ctypes import Structure, c_float, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, pointer


class Args(Structure):
    """`cpu::SoftcapArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("out", c_void_p),
        ("x", c_void_p),
        ("count", c_int64),
        ("cap", c_float),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("softcap", Args)

    def run(
        out_TV: Array,
        x_TV: Array,
        *,
        cap: float,
    ) -> None:
        call(Args(pointer(out_TV), pointer(x_TV), x_TV.size, cap))

    return run
