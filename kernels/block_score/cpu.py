"""The scores of units in C++."""

from collections.abc import Callable
from ctypes import Structure, c_float, c_int64, c_void_p

from vivace.kernels.attention.cpu import MAX_HEAD_DIM
from vivace.kernels.cpu.library import Array, Library, pointer


class Args(Structure):
    """`cpu::BlockScoreArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("scores", c_void_p),
        ("q", c_void_p),
        ("meta", c_void_p),
        ("block_tables", c_void_p),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("budgets", c_void_p),
        ("dense_layers", c_void_p),
        ("H", c_int64),
        ("G", c_int64),
        ("S", c_int64),
        ("D", c_int64),
        ("B", c_int64),
        ("X", c_int64),
        ("layer", c_int64),
        ("scale", c_float),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("block_score", Args)

    def run(
        scores_BGXZ: Array,
        q_THD: Array,
        meta: Array,
        block_tables_BX: Array,
        query_starts: Array,
        context_lens_B: Array,
        budgets_B: Array,
        dense_layers_B: Array,
        *,
        layer: int,
        scale: float,
        block_tokens: int,
    ) -> None:
        _, H, D = q_THD.shape
        if D > MAX_HEAD_DIM:
            raise ValueError(f"head size must be at most {MAX_HEAD_DIM}, got {D}")
        requests = (block_tables_BX, query_starts, context_lens_B, budgets_B, dense_layers_B)
        pointers = map(pointer, (scores_BGXZ, q_THD, meta, *requests))
        B, X = block_tables_BX.shape
        call(Args(*pointers, H, meta.shape[1], block_tokens, D, B, X, layer, scale))

    return run
