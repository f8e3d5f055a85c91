"""What routing to experts means, on any device. Never optimise this file."""

import torch


def run(
    weights_TK: torch.Tensor,
    experts_TK: torch.Tensor,
    logits_TE: torch.Tensor,
    loads_E: torch.Tensor | None = None,
    bias_E: torch.Tensor | None = None,
    *,
    scoring: str,
    renormalize: bool,
    scale: float = 1.0,
    num_groups: int = 1,
    top_groups: int = 1,
) -> None:
    """See `kernels.moe_route`. A stable sort keeps the lower of equals in front."""
    wide = logits_TE.double()
    scores_TE = (wide.softmax(1) if scoring == "softmax" else wide.sigmoid()).float()
    ranking_TE = logits_TE if bias_E is None else scores_TE + bias_E
    order_TE = ranking_TE.argsort(dim=1, descending=True, stable=True)
    if top_groups < num_groups:
        grouped = ranking_TE.unflatten(1, (num_groups, -1)).sort(dim=2, descending=True).values
        worth = grouped[:, :, : 1 if bias_E is None else 2].sum(2)
        best = worth.argsort(dim=1, descending=True, stable=True)[:, :top_groups]
        group_of = order_TE // grouped.shape[2]
        is_out = (group_of[:, :, None] != best[:, None]).all(2)
        order_TE = order_TE.gather(1, is_out.int().argsort(dim=1, stable=True))
    chosen_TK = order_TE[:, : experts_TK.shape[1]]
    if renormalize and scoring == "softmax":
        weights = wide.gather(1, chosen_TK).softmax(1).float()
    else:
        weights = scores_TE.gather(1, chosen_TK)
        if renormalize:
            weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    weights_TK.copy_(weights * scale)
    experts_TK.copy_(chosen_TK)
    if loads_E is not None:
        loads_E += chosen_TK.flatten().bincount(minlength=len(loads_E))
