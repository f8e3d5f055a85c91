"""The rotary table in C++."""

from collections.abc import Callable
from ctypes import Structure, c_float, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, optional_pointer, pointer


class Args(Structure):
    """`cpu::RopeTableArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("cos_sin", c_void_p),
        ("positions", c_void_p),
        ("inv_freq", c_void_p),
        ("variants", c_void_p),
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
        variants_T: Array | None = None,
        *,
        scale: float,
    ) -> None:
        pointers = map(pointer, (cos_sin_TD, positions_T, inv_freq))
        T, half = len(positions_T), inv_freq.shape[1]
        call(Args(*pointers, optional_pointer(variants_T), T, half, scale))

    return run
