"""Projections by int4 experts in C++."""

from collections.abc import Callable
from ctypes import Structure, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, optional_pointer, pointer
from vivace.kernels.memory.cpu import PackedMatrix


class Args(Structure):
    """`cpu::ExpertLinearInt4Args` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("out", c_void_p),
        ("q", c_void_p),
        ("params", c_void_p),
        ("experts", c_void_p),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("T", c_int64),
        ("K", c_int64),
        ("E", c_int64),
        ("N", c_int64),
        ("I", c_int64),
        ("has_own_rows", c_int64),
        ("group", c_int64),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("expert_linear_int4", Args)

    def run(
        out_TKN: Array,
        q: Array,
        params: Array,
        experts_TK: Array,
        weight_ENI: PackedMatrix,
        bias_EN: Array | None = None,
    ) -> None:
        pointers = map(pointer, (out_TKN, q, params, experts_TK, weight_ENI.data))
        sizes = (*experts_TK.shape, *weight_ENI.shape)
        call(Args(*pointers, optional_pointer(bias_EN), *sizes, q.ndim == 3, weight_ENI.group))

    return run
