"""Logprobs in C++."""

from collections.abc import Callable
from ctypes import Structure, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, pointer


class Args(Structure):
    """`cpu::LogprobsArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("chosen", c_void_p),
        ("ranks", c_void_p),
        ("top_ids", c_void_p),
        ("top_logprobs", c_void_p),
        ("logits", c_void_p),
        ("tokens", c_void_p),
        ("R", c_int64),
        ("V", c_int64),
        ("K", c_int64),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("logprobs", Args)

    def run(
        chosen_R: Array,
        ranks_R: Array,
        top_ids_RK: Array,
        top_logprobs_RK: Array,
        logits_RV: Array,
        tokens_R: Array,
    ) -> None:
        R, V = logits_RV.shape
        pointers = map(
            pointer, (chosen_R, ranks_R, top_ids_RK, top_logprobs_RK, logits_RV, tokens_R)
        )
        call(Args(*pointers, R, V, top_ids_RK.shape[1]))

    return run
