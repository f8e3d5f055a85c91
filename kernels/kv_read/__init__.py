"""K and V of given slots, out of the cache's own layout: the door for tests and for moving blocks."""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype, expect_kv_cache


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole."""

    def __call__(
        self,
        k_TGD: Buffer,  # fp32, out
        v_TGD: Buffer,  # fp32, out
        kv_cache: Buffer,  # from Memory.kv_cache
        slots_T: Buffer,  # int32
    ) -> None: ...


def check(k_TGD: Buffer, v_TGD: Buffer, kv_cache: Buffer, slots_T: Buffer) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    T, G, D = expect("k", k_TGD, None, None, None)
    expect("v", v_TGD, T, G, D)
    expect("slots", slots_T, T)
    expect_kv_cache(kv_cache, G, D)
    expect_dtype("slots", slots_T, "int32")
    expect_dtype("k", k_TGD, "float32")
    expect_dtype("v", v_TGD, "float32")
