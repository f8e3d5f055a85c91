"""The adding of residuals in C++."""

from collections.abc import Callable
from ctypes import Structure, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, pointer


class Args(Structure):
    """`cpu::AddArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("out", c_void_p),
        ("x", c_void_p),
        ("residual", c_void_p),
        ("count", c_int64),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("add", Args)

    def run(
        out: Array,
        x: Array,
        residual: Array,
    ) -> None:
        call(Args(pointer(out), pointer(x), pointer(residual), x.size))

    return run
