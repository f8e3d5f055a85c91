"""What quantizing rows means, on any device. Never optimise this file."""

import torch


def run(q: torch.Tensor, params: torch.Tensor, x: torch.Tensor) -> None:
    """See `kernels.quantize`."""
    if x.shape[-1] == 0:
        params[..., 0], params[..., 1] = 1.0, 0.0
        return
    lo = x.amin(dim=-1).clamp(max=0)
    hi = x.amax(dim=-1).clamp(min=0)
    scale = (hi - lo) / 255
    scale = torch.where(scale >= 2.0**-126, scale, torch.ones_like(scale))
    inverse = 1 / scale
    zero = torch.round(-lo * inverse)
    rounded = torch.round(x * inverse[..., None]) + zero[..., None]
    q.copy_(rounded.nan_to_num(0).clamp(0, 255).to(torch.uint8))
    params[..., 0] = torch.where(x.isnan().any(dim=-1), torch.nan, scale)
    params[..., 1] = zero
