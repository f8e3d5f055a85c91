"""What the choice of units means, on any device. Never optimise this file."""

import torch

from vivace.kernels.block_score.reference import sparse_requests
from vivace.kernels.selection import RECENT_UNITS, SINK_UNITS, unit_tokens


def run(
    selected_BGXZ: torch.Tensor,
    num_selected_BG: torch.Tensor,
    scores_BGXZ: torch.Tensor,
    context_lens_B: torch.Tensor,
    budgets_B: torch.Tensor,
    dense_layers_B: torch.Tensor,
    *,
    layer: int,
    block_tokens: int,
) -> None:
    """See `kernels.block_topk`. A stable sort keeps the lower of equals in front; False sorts before True."""
    U = unit_tokens(block_tokens)
    num_selected_BG.fill_(-1)
    for b in sparse_requests(context_lens_B, budgets_B, dense_layers_B, layer, U):
        budget, num_units = int(budgets_B[b]), -(-int(context_lens_B[b]) // U)
        scores = scores_BGXZ[b].flatten(1)[:, :num_units].clone()
        most = torch.finfo(torch.float64).max  # inf is for those that are always selected
        ranking = scores.double().nan_to_num(nan=-most, posinf=most, neginf=-most / 2)
        ranking[:, :SINK_UNITS] = torch.inf
        ranking[:, num_units - RECENT_UNITS :] = torch.inf
        order = ranking.argsort(dim=1, descending=True, stable=True)
        chosen = order[:, :budget].sort(dim=1).values
        selected_BGXZ[b].flatten(1)[:, :budget] = chosen.int()
        num_selected_BG[b] = budget
