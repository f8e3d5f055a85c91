"""What attention over the paged cache means, in fp32 on any device. Never optimise this file."""

import torch


def run(
    out_THD: torch.Tensor,
    q_THD: torch.Tensor,
    kv_cache: torch.Tensor,
    block_tables_BX: torch.Tensor,
    query_starts: torch.Tensor,
    context_lens_B: torch.Tensor,
    *,
    num_kv_heads: int,
    scale: float,
) -> None:
    """See `kernels.attention`. One request at a time; the whole softmax at once, not in splits."""
    S = kv_cache.shape[2]
    starts, lens = query_starts.tolist(), context_lens_B.tolist()
    out_THD[starts[-1] :] = 0
    for b, context_len in enumerate(lens):
        q_HCD = q_THD[starts[b] : starts[b + 1]].transpose(0, 1)
        num_rows = q_HCD.shape[1]
        if num_rows == 0:
            continue
        blocks = block_tables_BX[b, : -(-context_len // S)].long()
        k, v = (
            kv_cache[blocks, i]
            .flatten(0, 1)[:context_len]
            .transpose(0, 1)  # [G, context, D]
            .repeat_interleave(q_HCD.shape[0] // num_kv_heads, dim=0)
            for i in (0, 1)
        )
        scores = q_HCD @ k.transpose(1, 2) * scale
        position = torch.arange(context_len, device=scores.device)
        row_position = torch.arange(context_len - num_rows, context_len, device=scores.device)
        scores = scores.masked_fill(position > row_position[:, None], -float("inf"))
        out_THD[starts[b] : starts[b + 1]] = (scores.softmax(-1) @ v).transpose(0, 1)
