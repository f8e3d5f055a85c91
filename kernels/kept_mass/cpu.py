"""The gauge of a selection in C++."""

from collections.abc import Callable
from ctypes import Structure, c_void_p

from vivace.kernels.attention.cpu import MAX_HEAD_DIM
from vivace.kernels.attention.cpu import Args as AttentionArgs
from vivace.kernels.cpu.library import Array, Library, kv_type, optional_pointer, pointer


class Args(Structure):
    """`cpu::KeptMassArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("mass", c_void_p),
        ("measured", c_void_p),
        ("before", c_void_p),
        *AttentionArgs._fields_,
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("kept_mass", Args)

    def run(
        mass_B2: Array,
        q_THD: Array,
        kv_cache: Array,
        block_tables_BX: Array,
        query_starts: Array,
        context_lens_B: Array,
        selected_BGXZ: Array,
        num_selected_BG: Array,
        measured_B: Array,
        before_B2: Array | None = None,
        *,
        num_kv_heads: int,
        scale: float,
        softcap: float = 0.0,
    ) -> None:
        T, H, D = q_THD.shape
        if D > MAX_HEAD_DIM:
            raise ValueError(f"head size must be at most {MAX_HEAD_DIM}, got {D}")
        B, X = block_tables_BX.shape
        own = pointer(mass_B2), pointer(measured_B), optional_pointer(before_B2)
        inputs = map(pointer, (q_THD, kv_cache, block_tables_BX, query_starts, context_lens_B))
        selection = pointer(selected_BGXZ), pointer(num_selected_BG)
        sizes = (T, H, num_kv_heads, kv_cache.shape[3], D, B, X)
        numbers = (*sizes, 0, kv_type(kv_cache), scale, softcap)
        call(Args(*own, None, *inputs, None, *selection, *numbers))

    return run
