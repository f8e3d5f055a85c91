"""Mean and standard deviation of K over each of some units of the cache: what `block_score` knows of them.

Of the K that the cache holds, so after its rounding: mean = sum / U, std = sqrt(sum((k - mean)^2) / U), in fp32, then rounded
to bf16. All slots of a unit are written before. See `kernels.selection` for what a unit is.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_bf16, expect_dtype, expect_kv_cache
from vivace.kernels.selection import unit_tokens


class Run(Protocol):
    """Every backend's `run`: outputs first."""

    def __call__(
        self,
        meta: Buffer,  # bf16 [N * Z units, G, 2, D], mean and std; out: only the units given
        kv_cache: Buffer,  # from Memory.kv_cache
        units: Buffer,  # int32, units of the cache, each at most once; a negative one is skipped
        *,
        block_tokens: int,  # S
    ) -> None: ...


def check(meta: Buffer, kv_cache: Buffer, units: Buffer, *, block_tokens: int) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    num_units, G, _, D = expect("meta", meta, None, None, 2, None)
    expect_bf16("meta", meta)
    expect_kv_cache(kv_cache, G, D)
    expect("units", units, None)
    expect_dtype("units", units, "int32")
    expect_units(kv_cache.shape[0], num_units, block_tokens)
    if block_tokens not in kv_cache.shape[2:4]:
        raise ValueError(
            f"block_tokens ({block_tokens}) does not fit kv_cache {list(kv_cache.shape)}"
        )


def expect_units(num_blocks: int, num_units: int, block_tokens: int) -> None:
    """Raise ValueError unless `meta` has the units of so many blocks."""
    wanted = num_blocks * (block_tokens // unit_tokens(block_tokens))
    if num_units != wanted:
        raise ValueError(f"meta must have {wanted} units, of {num_blocks} blocks, got {num_units}")
