"""What the kept share of attention means, in fp32 on any device. Never optimise this file."""

import torch

from vivace.kernels.kv_read.reference import widened
from vivace.kernels.selection import unit_tokens


def run(
    mass_B2: torch.Tensor,
    q_THD: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables_BX: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens_B: torch.Tensor,
    selected_BGXZ: torch.Tensor,
    num_selected_BG: torch.Tensor,
    measured_B: torch.Tensor,
    before_B2: torch.Tensor | None = None,
    *,
    num_kv_heads: int,
    scale: float,
    softcap: float = 0.0,
) -> None:
    """See `kernels.kept_mass`."""
    mass_B2.copy_(torch.zeros_like(mass_B2) if before_B2 is None else before_B2)
    S, D, G = kv_cache.shape[2], q_THD.shape[2], num_kv_heads
    U = unit_tokens(S)
    for b in (measured_B.bool() & (num_selected_BG >= 0).all(1)).nonzero()[:, 0].tolist():
        length = int(context_lens_B[b])
        position = torch.arange(length, device=q_THD.device)
        blocks = block_tables_BX[b, position // S].long()
        k = widened(kv_cache[blocks, 0, position % S], D).transpose(0, 1)  # [G, length, D]
        q = q_THD[int(query_starts[b + 1]) - 1].unflatten(0, (G, -1))  # [G, H / G, D]
        scores = q @ k.transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        weights = scores.softmax(2)  # [G, H / G, length]
        is_kept = torch.zeros(G, length, dtype=torch.bool, device=q_THD.device)
        for g in range(G):
            units = selected_BGXZ[b, g].flatten()[: int(num_selected_BG[b, g])]
            is_kept[g] = torch.isin(position // U, units)
        kept = (weights * is_kept[:, None]).sum(2).mean()
        mass_B2[b] += torch.stack((kept, torch.ones_like(kept)))
