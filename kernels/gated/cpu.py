"""Gated activations in C++."""

from collections.abc import Callable
from ctypes import Structure, c_float, c_int64, c_void_p
from math import prod

from vivace.kernels.cpu.library import Array, Library, pointer
from vivace.kernels.gated import ACTIVATIONS


class Args(Structure):
    """`cpu::GatedArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("out", c_void_p),
        ("gate_up", c_void_p),
        ("T", c_int64),
        ("F", c_int64),
        ("activation", c_int64),
        ("alpha", c_float),
        ("limit", c_float),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("gated", Args)

    def run(
        out: Array,
        gate_up: Array,
        *,
        activation: str = "silu",
        alpha: float = 1.702,
        limit: float = 7.0,
    ) -> None:
        *leading, F = out.shape
        which = ACTIVATIONS.index(activation)
        call(Args(pointer(out), pointer(gate_up), prod(leading), F, which, alpha, limit))

    return run
