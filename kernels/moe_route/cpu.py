"""Routing to experts in C++."""

from collections.abc import Callable
from ctypes import Structure, c_float, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, optional_pointer, pointer

MAX_EXPERTS = 1024  # the size of arrays on the stack in C++


class Args(Structure):
    """`cpu::MoeRouteArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("weights", c_void_p),
        ("experts", c_void_p),
        ("logits", c_void_p),
        ("loads", c_void_p),
        ("bias", c_void_p),
        ("T", c_int64),
        ("E", c_int64),
        ("K", c_int64),
        ("num_groups", c_int64),
        ("top_groups", c_int64),
        ("is_softmax", c_int64),
        ("renormalize", c_int64),
        ("scale", c_float),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("moe_route", Args)

    def run(
        weights_TK: Array,
        experts_TK: Array,
        logits_TE: Array,
        loads_E: Array | None = None,
        bias_E: Array | None = None,
        *,
        scoring: str,
        renormalize: bool,
        scale: float = 1.0,
        num_groups: int = 1,
        top_groups: int = 1,
    ) -> None:
        (T, E), K = logits_TE.shape, weights_TK.shape[1]
        if E > MAX_EXPERTS:
            raise ValueError(f"experts must be at most {MAX_EXPERTS}, got {E}")
        pointers = map(pointer, (weights_TK, experts_TK, logits_TE))
        more = optional_pointer(loads_E), optional_pointer(bias_E)
        sizes = (T, E, K, num_groups, top_groups)
        is_softmax = scoring == "softmax"
        call(Args(*pointers, *more, *sizes, is_softmax, renormalize, scale))

    return run
