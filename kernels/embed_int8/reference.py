"""What an int8 embedding means, on any device. Never optimise this file."""

import torch

from vivace.kernels.memory.reference import QuantizedTensor


def run(
    out_TM: torch.Tensor,
    tokens_T: torch.Tensor,
    table_VM: QuantizedTensor,
    *,
    scale: float = 1.0,
) -> None:
    """See `kernels.embed_int8`."""
    tokens = tokens_T.long()
    scales_T1 = (table_VM.scales[tokens] * torch.tensor(scale, dtype=torch.float32))[:, None]
    out_TM.copy_(table_VM.q[tokens].float() * scales_T1)
