"""Reading the cache of a GPU, for tests and for moving blocks. Bound by bytes."""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Config, Launcher
from vivace.kernels.linear.triton import widen

DEFAULT = Config()


@triton.jit
def _kv_read(
    out_k,  # fp32 [T, G, D]
    out_v,  # fp32 [T, G, D]
    kv_cache,  # fp32, bf16 or int8 [N, 2, G, S, D or D + 4]
    slots,  # int32 [T]
    G: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    IS_INT8: tl.constexpr,
    UPCAST: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    is_v = tl.program_id(1)
    slot = tl.load(slots + tl.program_id(0)).to(tl.int64)
    head, d = tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK)[None, :]
    mask = (head < G) & (d < D)
    width = D + 4 if IS_INT8 else D
    at = kv_cache + (((slot // S * 2 + is_v) * G + head) * S + slot % S) * width
    x = widen(tl.load(at + d, mask=mask, other=0.0), UPCAST)
    if IS_INT8:  # the scale lies where it lies, so it is read byte by byte
        place = tl.arange(0, 4)[None, :]
        scale = tl.load(at + D + place, mask=head < G, other=0).to(tl.int32) & 0xFF
        scale = tl.sum(scale << (8 * place), axis=1).to(tl.float32, bitcast=True)
        x *= scale[:, None]
    out = out_v if is_v else out_k
    tl.store(out + (tl.program_id(0).to(tl.int64) * G + head) * D + d, x, mask=mask)


def bind(launcher: Launcher) -> Callable[..., None]:
    config = launcher.config("kv_read", "all", DEFAULT)

    def run(
        k_TGD: torch.Tensor, v_TGD: torch.Tensor, kv_cache: torch.Tensor, slots_T: torch.Tensor
    ) -> None:
        """See `kernels.kv_read`."""
        T, G, D = k_TGD.shape
        constexprs = {
            "G": G,
            "D": D,
            "S": kv_cache.shape[3],
            "IS_INT8": kv_cache.dtype == torch.int8,
            "UPCAST": launcher.upcast,
            "HEADS": triton.next_power_of_2(G),
            "BLOCK": triton.next_power_of_2(D),
        }
        launcher.launch(_kv_read, (T, 2), (k_TGD, v_TGD, kv_cache, slots_T), constexprs, config)

    return run
