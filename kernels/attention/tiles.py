"""Which tiles the Triton kernels of attention run with, and what their machine code must show. Holds no kernel."""

from vivace.kernels.gpu.launcher import Config

# A split is of a fixed size: one that followed the lengths or the batch would change the bits of a row.
DECODE = (
    Config({"BLOCK_N": 64, "SPLIT": 512}, num_warps=4, num_stages=3),
    Config({"BLOCK_N": 64, "SPLIT": 512}, num_warps=4, num_stages=4),
    Config({"BLOCK_N": 128, "SPLIT": 512}, num_warps=4, num_stages=2),
    Config({"BLOCK_N": 128, "SPLIT": 1024}, num_warps=4, num_stages=2),
    Config({"BLOCK_N": 64, "SPLIT": 256}, num_warps=4, num_stages=3),
)
PREFILL = (
    Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2),
    Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=4, num_stages=2),
    Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=3),
    Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=2),
)
CANDIDATES = {"attn_decode": DECODE, "attn_prefill": PREFILL}  # the first where nothing was tuned

# Of heads of 128 in bf16: mnemonics that each kernel must contain, by target.
EXPECT = {
    "sm_80": {"attn_decode": ("HMMA", "LDGSTS"), "attn_prefill": ("HMMA", "LDGSTS")},
    "sm_90": {"attn_decode": ("HMMA", "LDGSTS"), "attn_prefill": ("HGMMA", "UTMALDG")},
}


def decode(is_fp32: bool, head_dim: int) -> Config:
    """Of attn_decode where nothing was tuned."""
    if is_fp32 or head_dim > 128:
        return Config({"BLOCK_N": 32, "SPLIT": 512}, num_warps=4, num_stages=2)
    return DECODE[0]


def prefill(is_fp32: bool, head_dim: int) -> Config:
    """Of attn_prefill where nothing was tuned."""
    if is_fp32:
        return Config({"BLOCK_M": 64, "BLOCK_N": 32}, num_warps=8, num_stages=1)
    return PREFILL[0]
