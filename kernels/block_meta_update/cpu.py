"""The metadata of units in C++."""

from collections.abc import Callable
from ctypes import Structure, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, kv_type, pointer


class Args(Structure):
    """`cpu::BlockMetaUpdateArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("meta", c_void_p),
        ("kv_cache", c_void_p),
        ("units", c_void_p),
        ("count", c_int64),
        ("G", c_int64),
        ("S", c_int64),
        ("D", c_int64),
        ("kv_type", c_int64),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("block_meta_update", Args)

    def run(meta: Array, kv_cache: Array, units: Array, *, block_tokens: int) -> None:
        _, G, _, D = meta.shape
        pointers = map(pointer, (meta, kv_cache, units))
        call(Args(*pointers, len(units), G, block_tokens, D, kv_type(kv_cache)))

    return run
