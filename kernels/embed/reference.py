"""What an embedding means, on any device. Never optimise this file."""

import torch


def run(
    out_TM: torch.Tensor, tokens_T: torch.Tensor, table_VM: torch.Tensor, *, scale: float = 1.0
) -> None:
    """See `kernels.embed`."""
    out_TM.copy_(table_VM[tokens_T.long()].float() * scale)
