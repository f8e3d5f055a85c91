"""Projections by int4 in C++."""

from collections.abc import Callable
from ctypes import Structure, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, optional_pointer, pointer
from vivace.kernels.memory.cpu import PackedMatrix


class Args(Structure):
    """`cpu::LinearInt4Args` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("out", c_void_p),
        ("q", c_void_p),
        ("params", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("T", c_int64),
        ("N", c_int64),
        ("K", c_int64),
        ("group", c_int64),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("linear_int4", Args)

    def run(
        out_TN: Array,
        q_TK: Array,
        params_T2: Array,
        weight_NK: PackedMatrix,
        bias_N: Array | None = None,
    ) -> None:
        N, K = weight_NK.shape
        pointers = (
            *map(pointer, (out_TN, q_TK, params_T2, weight_NK.data)),
            optional_pointer(bias_N),
        )
        call(Args(*pointers, len(q_TK), N, K, weight_NK.group))

    return run
