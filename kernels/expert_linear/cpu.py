"""Projections by experts in C++."""

from collections.abc import Callable
from ctypes import Structure, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, is_bf16, optional_pointer, pointer


class Args(Structure):
    """`cpu::ExpertLinearArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("out", c_void_p),
        ("x", c_void_p),
        ("experts", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("T", c_int64),
        ("K", c_int64),
        ("E", c_int64),
        ("N", c_int64),
        ("I", c_int64),
        ("has_own_rows", c_int64),
        ("is_bf16", c_int64),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("expert_linear", Args)

    def run(
        out_TKN: Array,
        x: Array,
        experts_TK: Array,
        weight_ENI: Array,
        bias_EN: Array | None = None,
    ) -> None:
        pointers = map(pointer, (out_TKN, x, experts_TK, weight_ENI))
        sizes = (*experts_TK.shape, *weight_ENI.shape)
        call(Args(*pointers, optional_pointer(bias_EN), *sizes, x.ndim == 3, is_bf16(weight_ENI)))

    return run
