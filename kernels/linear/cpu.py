"""Projections in C++."""

from collections.abc import Callable
from ctypes import Structure, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, is_bf16, optional_pointer, pointer


class Args(Structure):
    """`cpu::LinearArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("out", c_void_p),
        ("x", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("T", c_int64),
        ("N", c_int64),
        ("K", c_int64),
        ("is_bf16", c_int64),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("linear", Args)

    def run(
        out_TN: Array,
        x_TK: Array,
        weight_NK: Array,
        bias_N: Array | None = None,
    ) -> None:
        N, K = weight_NK.shape
        pointers = (*map(pointer, (out_TN, x_TK, weight_NK)), optional_pointer(bias_N))
        call(Args(*pointers, len(x_TK), N, K, is_bf16(weight_NK)))

    return run
