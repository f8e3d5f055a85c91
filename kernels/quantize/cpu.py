"""Quantizing rows in C++."""

from collections.abc import Callable
from ctypes import Structure, c_int64, c_void_p
from math import prod

from vivace.kernels.cpu.library import Array, Library, pointer


class Args(Structure):
    """`cpu::QuantizeArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("q", c_void_p),
        ("params", c_void_p),
        ("x", c_void_p),
        ("T", c_int64),
        ("K", c_int64),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("quantize", Args)

    def run(q: Array, params: Array, x: Array) -> None:
        *rows, K = x.shape
        call(Args(pointer(q), pointer(params), pointer(x), prod(rows), K))

    return run
