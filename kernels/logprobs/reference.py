"""What logprobs mean, on any device. Never optimise this file."""

import torch


def run(
    chosen_R: torch.Tensor,
    ranks_R: torch.Tensor,
    top_ids_RK: torch.Tensor,
    top_logprobs_RK: torch.Tensor,
    logits_RV: torch.Tensor,
    tokens_R: torch.Tensor,
) -> None:
    """See `kernels.logprobs`."""
    K = top_ids_RK.shape[1]
    logprobs = logits_RV.double().log_softmax(1)
    chosen = tokens_R.long()[:, None]
    chosen_R.copy_(logprobs.gather(1, chosen)[:, 0])
    ranks_R.copy_((logits_RV > logits_RV.gather(1, chosen)).sum(1) + 1)
    order = logits_RV.sort(dim=1, descending=True, stable=True).indices[:, :K]
    top_ids_RK.copy_(order)
    top_logprobs_RK.copy_(logprobs.gather(1, order))
