"""Mean and standard deviation of K over units, in Triton: a program per unit and KV head. Bound by bytes: reads K once."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Config, Launcher
from vivace.kernels.kv_read.triton import read_heads
from vivace.kernels.linear.triton import cast
from vivace.kernels.selection import unit_tokens

CONFIG = Config(num_warps=1, num_stages=1)
EXPECT = {
    target: {"block_meta_update *bf16:16": ("16-byte loads",)} for target in ("sm_80", "sm_90")
}


@triton.jit(do_not_specialize=["G"])
def block_meta_update(
    meta,  # bf16 [N * Z, G, 2, D]
    kv_cache,  # fp32, bf16 or int8 [N, 2, G, S, D or D + 4]
    units,  # int32 [grid 0]
    G,
    S: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
    TOKENS: tl.constexpr,  # U, padded
    WIDTH: tl.constexpr,  # D, padded
    IS_INT8: tl.constexpr,
    UPCAST: tl.constexpr,
):
    unit, g = tl.load(units + tl.program_id(0)).to(tl.int64), tl.program_id(1)
    if unit >= 0:
        block, first = unit // (S // U), unit % (S // U) * U
        token = tl.arange(0, TOKENS)[:, None]
        row = (block * 2 * G + g) * S + first + token
        k = read_heads(kv_cache, row, token < U, D, IS_INT8, UPCAST, WIDTH)
        mean = tl.sum(k, 0) / U
        off = tl.where(token < U, k - mean[None, :], 0.0)
        std = tl.sqrt(tl.sum(off * off, 0) / U)
        width = tl.arange(0, WIDTH)
        out = meta + (unit * G + g) * 2 * D + width
        tl.store(out, cast(mean, tl.bfloat16, UPCAST), mask=width < D)
        tl.store(out + D, cast(std, tl.bfloat16, UPCAST), mask=width < D)


def bind(launcher: Launcher) -> Callable[..., None]:
    """The op on one device."""

    def run(
        meta: torch.Tensor, kv_cache: torch.Tensor, units: torch.Tensor, *, block_tokens: int
    ) -> None:
        _, G, _, D = meta.shape
        U = unit_tokens(block_tokens)
        padded = {"TOKENS": triton.next_power_of_2(U), "WIDTH": triton.next_power_of_2(D)}
        shape = {"S": block_tokens, "D": D, "U": U}
        types = {"IS_INT8": kv_cache.dtype == torch.int8, "UPCAST": launcher.upcast}
        launcher.launch(
            block_meta_update,
            (len(units), G),
            (meta, kv_cache, units, G),
            shape | padded | types,
            CONFIG,
        )

    return run
