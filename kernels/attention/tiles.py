"""Which tiles the Triton kernels of attention run with, and what their machine code must show. Holds no kernel."""

from vivace.kernels.gpu.launcher import Config

# A split is of a fixed size: one that followed the lengths or the batch would change the bits of a row.
# The pipeliner takes three stages for the block numbers, so five leave two tiles of K and V in flight.
DECODE = (
    Config({"BLOCK_N": 64, "SPLIT": 512}, num_warps=4, num_stages=5),
    Config({"BLOCK_N": 64, "SPLIT": 512}, num_warps=4, num_stages=3),
    Config({"BLOCK_N": 64, "SPLIT": 256}, num_warps=4, num_stages=5),
    Config({"BLOCK_N": 128, "SPLIT": 512}, num_warps=4, num_stages=2),
    Config({"BLOCK_N": 128, "SPLIT": 1024}, num_warps=4, num_stages=2),
)
PREFILL = (
    Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2),
    Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3),
    Config(
        {"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=4, num_stages=2
    ),  # 40 bytes of stack on sm_90
    Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=2),
    Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=8, num_stages=2),
)
CANDIDATES = {"attn_decode": DECODE, "attn_prefill": PREFILL}

# Mnemonics that the default tiles must become, of heads of 128 in bf16 and blocks of 64 tokens; nowhere a stack.
EXPECT = {
    "sm_80": {"attn_decode": ("HMMA", "LDGSTS"), "attn_prefill": ("HMMA", "LDGSTS")},
    "sm_90": {"attn_decode": ("HMMA", "LDGSTS"), "attn_prefill": ("HGMMA", "UTMALDG")},
}


def decode(is_fp32: bool, head_dim: int) -> Config:
    """Of attn_decode where nothing was tuned."""
    if is_fp32:
        return Config({"BLOCK_N": 32, "SPLIT": 512}, num_warps=8, num_stages=1)
    if head_dim > 128:
        return Config({"BLOCK_N": 32, "SPLIT": 512}, num_warps=4, num_stages=2)
    return DECODE[0]


def prefill(is_fp32: bool, head_dim: int, is_hopper: bool) -> Config:
    """Of attn_prefill where nothing was tuned: the most rows that need no stack."""
    if is_fp32:
        rows, block_n = 64, 16 if head_dim > 128 else 32
        return Config({"BLOCK_M": rows, "BLOCK_N": block_n}, num_warps=8, num_stages=1)
    return PREFILL[0] if is_hopper and head_dim <= 128 else PREFILL[4]
