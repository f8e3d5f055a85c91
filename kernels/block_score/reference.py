"""What a unit's score means, in fp32 on any device. Never optimise this file."""

import torch

from vivace.kernels.selection import unit_tokens


def run(
    scores_BGXZ: torch.Tensor,
    q_THD: torch.Tensor,
    meta: torch.Tensor,
    block_tables_BX: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens_B: torch.Tensor,
    budgets_B: torch.Tensor,
    dense_layers_B: torch.Tensor,
    *,
    layer: int,
    scale: float,
    block_tokens: int,
) -> None:
    """See `kernels.block_score`."""
    G, Z = meta.shape[1], scores_BGXZ.shape[3]
    U = unit_tokens(block_tokens)
    for b in sparse_requests(context_lens_B, budgets_B, dense_layers_B, layer, U):
        num_full = int(context_lens_B[b]) // U
        j = torch.arange(num_full, device=meta.device)
        place = block_tables_BX[b, j // Z].long() * Z + j % Z
        mean, std = meta[place].float().permute(2, 1, 0, 3)  # [G, units, D]
        q = q_THD[int(query_starts[b + 1]) - 1].unflatten(0, (G, -1))  # [G, H / G, D]
        s = scale * (q @ mean.transpose(1, 2) + q.abs() @ std.transpose(1, 2))
        scores_BGXZ[b] = -float("inf")
        comparable = s - s.logsumexp(2, keepdim=True)
        scores_BGXZ[b].flatten(1)[:, :num_full] = comparable.amax(1)


def sparse_requests(
    context_lens_B: torch.Tensor,
    budgets_B: torch.Tensor,
    dense_layers_B: torch.Tensor,
    layer: int,
    U: int,
) -> list[int]:
    """Which requests are sparse in a layer."""
    num_units = -(-context_lens_B // U)
    is_sparse = (layer >= dense_layers_B) & (budgets_B > 0) & (budgets_B < num_units)
    return is_sparse.nonzero()[:, 0].tolist()
