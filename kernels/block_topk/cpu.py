"""The choice of units in C++."""

from collections.abc import Callable
from ctypes import Structure, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, pointer


class Args(Structure):
    """`cpu::BlockTopkArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("selected", c_void_p),
        ("num_selected", c_void_p),
        ("scores", c_void_p),
        ("context_lens", c_void_p),
        ("budgets", c_void_p),
        ("dense_layers", c_void_p),
        ("G", c_int64),
        ("S", c_int64),
        ("B", c_int64),
        ("X", c_int64),
        ("layer", c_int64),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("block_topk", Args)

    def run(
        selected_BGXZ: Array,
        num_selected_BG: Array,
        scores_BGXZ: Array,
        context_lens_B: Array,
        budgets_B: Array,
        dense_layers_B: Array,
        *,
        layer: int,
        block_tokens: int,
    ) -> None:
        B, G, X, _ = scores_BGXZ.shape
        outs = pointer(selected_BGXZ), pointer(num_selected_BG)
        inputs = map(pointer, (scores_BGXZ, context_lens_B, budgets_B, dense_layers_B))
        call(Args(*outs, *inputs, G, block_tokens, B, X, layer))

    return run
