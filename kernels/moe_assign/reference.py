"""What the assignment of slots means, on any device. Never optimise this file."""

import torch

from vivace.kernels.moe_assign import tile_rows


def run(
    order_TK: torch.Tensor,
    tiles_TK3: torch.Tensor,
    experts_TK: torch.Tensor,
    *,
    num_experts: int,
) -> None:
    """See `kernels.moe_assign`."""
    rows = tile_rows(experts_TK.numel(), num_experts)
    if rows == 1:
        return
    experts, order = experts_TK.flatten().sort(stable=True)
    order_TK.copy_(order.view(order_TK.shape))
    tiles, begin = [], 0
    for e, count in enumerate(experts.bincount(minlength=num_experts).tolist()):
        end = begin + count
        tiles += [(e, at, min(at + rows, end)) for at in range(begin, end, rows)]
        begin = end
    tiles += [(-1, 0, 0)] * (experts_TK.numel() - len(tiles))
    tiles_TK3.copy_(torch.tensor(tiles, dtype=torch.int32).view(tiles_TK3.shape))
