"""The cache's reading in C++."""

from collections.abc import Callable
from ctypes import Structure, c_int64, c_void_p

from vivace.kernels.cpu.library import Array, Library, kv_type, pointer


class Args(Structure):
    """`cpu::KvReadArgs` of kernels/cpu/ops.h."""

    _pack_ = 1
    _fields_ = (
        ("k", c_void_p),
        ("v", c_void_p),
        ("kv_cache", c_void_p),
        ("slots", c_void_p),
        ("T", c_int64),
        ("G", c_int64),
        ("S", c_int64),
        ("D", c_int64),
        ("kv_type", c_int64),
    )


def bind(library: Library) -> Callable[..., None]:
    """The op on one library."""
    call = library.op("kv_read", Args)

    def run(
        k_TGD: Array,
        v_TGD: Array,
        kv_cache: Array,
        slots_T: Array,
    ) -> None:
        T, G, D = k_TGD.shape
        pointers = map(pointer, (k_TGD, v_TGD, kv_cache, slots_T))
        call(Args(*pointers, T, G, kv_cache.shape[3], D, kv_type(kv_cache)))

    return run
