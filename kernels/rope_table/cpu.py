"""The rotary table in C++."""

from collections.abc import Callable
from ctypes import Structure, c_float, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, pointer


class Args(Structure):
    """`cpu::RopeTableArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("cos_sin", c_void_p),
        ("positions", c_void_p),
        ("inv_freq", c_void_p),
        ("T", c_int64),
        ("half", c_int64),
        ("scale", c_float),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("rope_table", Args)

    def run(
        cos_sin_TD: Array,
        positions_T: Array,
        inv_freq: Array,
        *,
        scale: float,
    ) -> None:
        T, half = len(positions_T), len(inv_freq)
        call(Args(pointer(cos_sin_TD), pointer(positions_T), pointer(inv_freq), T, half, scale))

    return run
