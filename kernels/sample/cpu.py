"""Sampling in C++."""

from collections.abc import Callable
from ctypes import Structure, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, pointer


class Args(Structure):
    """`cpu::SampleArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("tokens", c_void_p),
        ("scores", c_void_p),
        ("logits", c_void_p),
        ("temperature", c_void_p),
        ("top_k", c_void_p),
        ("top_p", c_void_p),
        ("min_p", c_void_p),
        ("seeds", c_void_p),
        ("positions", c_void_p),
        ("repetition", c_void_p),
        ("frequency", c_void_p),
        ("presence", c_void_p),
        ("penalty_starts", c_void_p),
        ("penalty_ids", c_void_p),
        ("penalty_counts", c_void_p),
        ("bias_starts", c_void_p),
        ("bias_ids", c_void_p),
        ("bias_values", c_void_p),
        ("R", c_int64),
        ("V", c_int64),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("sample", Args)

    def run(
        tokens_R: Array,
        scores_RV: Array,
        logits_RV: Array,
        temperature_R: Array,
        top_k_R: Array,
        top_p_R: Array,
        min_p_R: Array,
        seeds_R: Array,
        positions_R: Array,
        repetition_R: Array,
        frequency_R: Array,
        presence_R: Array,
        penalty_starts: Array,
        penalty_ids: Array,
        penalty_counts: Array,
        bias_starts: Array,
        bias_ids: Array,
        bias_values: Array,
    ) -> None:
        R, V = logits_RV.shape
        outs = (tokens_R, scores_RV)
        rows = (logits_RV, temperature_R, top_k_R, top_p_R, min_p_R, seeds_R, positions_R)
        penalties = (repetition_R, frequency_R, presence_R)
        lists = (penalty_starts, penalty_ids, penalty_counts, bias_starts, bias_ids, bias_values)
        call(Args(*map(pointer, (*outs, *rows, *penalties, *lists)), R, V))

    return run
