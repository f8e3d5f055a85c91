"""Gated activations as bytes in C++."""

from collections.abc import Callable
from ctypes import Structure, c_void_p
from math import prod

from vivace.kernels.cpu.library import Array, Library, pointer
from vivace.kernels.gated import ACTIVATIONS
from vivace.kernels.gated.cpu import Args as GatedArgs


class Args(Structure):
    """`cpu::GatedQuantizeArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (("q", c_void_p), ("params", c_void_p), *GatedArgs._fields_)


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("gated_quantize", Args)

    def run(
        q: Array,
        params: Array,
        gate_up: Array,
        *,
        activation: str = "silu",
        alpha: float = 1.702,
        limit: float = 7.0,
    ) -> None:
        *rows, F = q.shape
        pointers = pointer(q), pointer(params), None, pointer(gate_up)
        call(Args(*pointers, prod(rows), F, ACTIVATIONS.index(activation), alpha, limit))

    return run
