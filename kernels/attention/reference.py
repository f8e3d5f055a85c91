"""What attention over the paged cache means, in fp32 on any device. Never optimise this file."""

import torch

from vivace.kernels.kv_read.reference import widened
from vivace.kernels.selection import unit_tokens


def run(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables_BX: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens_B: torch.Tensor,
    sinks_H: torch.Tensor | None = None,
    selected_BGXZ: torch.Tensor | None = None,
    num_selected_BG: torch.Tensor | None = None,
    *,
    num_kv_heads: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> None:
    """See `kernels.attention`. One request at a time; the whole softmax at once, not in splits."""
    S = kv_cache.shape[2]
    starts, lens = query_starts.tolist(), context_lens_B.tolist()
    out_THD[starts[-1] :] = 0
    for b, end in enumerate(lens):
        q_HCD = q_THD[starts[b] : starts[b + 1]].transpose(0, 1)
        H, num_rows, _ = q_HCD.shape
        if num_rows == 0:
            continue
        begin = max(0, end - num_rows - window + 1) if window else 0  # the first position read
        blocks = block_tables_BX[b, begin // S : -(-end // S)].long()
        position = torch.arange(begin, end, device=q_THD.device)
        k, v = (
            widened(kv_cache[blocks, i], q_THD.shape[2])
            .flatten(0, 1)[position - begin // S * S]
            .transpose(0, 1)  # [G, positions, D]
            .repeat_interleave(H // num_kv_heads, dim=0)
            for i in (0, 1)
        )
        scores = q_HCD @ k.transpose(1, 2) * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        row_position = torch.arange(end - num_rows, end, device=q_THD.device)[:, None]
        hidden = position > row_position
        if window:
            hidden |= position <= row_position - window
        scores = scores.masked_fill(hidden, -float("inf"))
        if selected_BGXZ is not None and num_selected_BG is not None:
            is_kept = _kept(selected_BGXZ[b], num_selected_BG[b], position // unit_tokens(S))
            is_kept = is_kept.repeat_interleave(H // num_kv_heads, dim=0)[:, None]
            scores = scores.masked_fill(~is_kept, -float("inf"))
            v = v.masked_fill(~is_kept.transpose(1, 2), 0)  # which may be NaN
        if sinks_H is not None:
            scores = torch.cat((scores, sinks_H[:, None, None].expand(H, num_rows, 1)), dim=2)
        weights = scores.softmax(-1)[:, :, : end - begin]
        out_THD[starts[b] : starts[b + 1]] = (weights @ v).transpose(0, 1)


def _kept(
    selected_GXZ: torch.Tensor, num_selected_G: torch.Tensor, units: torch.Tensor
) -> torch.Tensor:
    """Which of these units each KV head attends to, [G, units]."""
    rows = zip(selected_GXZ.flatten(1), num_selected_G.tolist(), strict=True)
    return torch.stack(
        [torch.ones_like(units).bool() if n < 0 else torch.isin(units, row[:n]) for row, n in rows]
    )
