"""Mean and standard deviation of K over units, in Triton: a program per unit and KV head. Bound by bytes: reads K once."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Config, Launcher
from vivace.kernels.selection import unit_tokens

CONFIG = Config(num_warps=1, num_stages=1)


@triton.jit
def block_meta_update(
    meta,  # bf16 [N * Z, G, 2, D]
    kv_cache,  # fp32 or bf16 [N, 2, G, S, D]
    units,  # int32 [grid 0]
    G: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    U: tl.constexpr,
    TOKENS: tl.constexpr,  # U, padded
    WIDTH: tl.constexpr,  # D, padded
):
    unit, g = tl.load(units + tl.program_id(0)).to(tl.int64), tl.program_id(1)
    if unit >= 0:
        block, first = unit // (S // U), unit % (S // U) * U
        token, d = tl.arange(0, TOKENS)[:, None], tl.arange(0, WIDTH)[None, :]
        is_there = (token < U) & (d < D)
        at = ((block * 2 * G + g) * S + first + token) * D + d
        k = tl.load(kv_cache + at, mask=is_there, other=0.0).to(tl.float32)
        mean = tl.sum(k, 0) / U
        off = tl.where(is_there, k - mean[None, :], 0.0)
        std = tl.sqrt(tl.sum(off * off, 0) / U)
        width = tl.arange(0, WIDTH)
        out = meta + (unit * G + g) * 2 * D + width
        tl.store(out, mean, mask=width < D)
        tl.store(out + D, std, mask=width < D)


def bind(launcher: Launcher) -> Callable[..., None]:
    """The op on one device."""

    def run(
        meta: torch.Tensor, kv_cache: torch.Tensor, units: torch.Tensor, *, block_tokens: int
    ) -> None:
        _, G, _, D = meta.shape
        U = unit_tokens(block_tokens)
        padded = {"TOKENS": triton.next_power_of_2(U), "WIDTH": triton.next_power_of_2(D)}
        shape = {"G": G, "S": block_tokens, "D": D, "U": U}
        launcher.launch(
            block_meta_update, (len(units), G), (meta, kv_cache, units), shape | padded, CONFIG
        )

    return run
