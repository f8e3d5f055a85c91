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
    # Two thread blocks of four warps a multiprocessor: one's products run beside the other's softmax.
    Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=4, num_stages=2),
    Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=4, num_stages=3),
    Config({"BLOCK_M": 128, "BLOCK_N": 64}, num_warps=8, num_stages=2),
    Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=4, num_stages=2),
    Config({"BLOCK_M": 64, "BLOCK_N": 64}, num_warps=8, num_stages=2),
)
CANDIDATES = {"attn_decode": DECODE, "attn_prefill": PREFILL}

# What the default tiles must become, in bf16; see `kernels.gpu.ahead`.
EXPECT = {
    "sm_80": {
        "attn_decode *bf16:16": ("HMMA", "16-byte loads"),
        "attn_prefill *bf16:16": ("HMMA", "16-byte loads"),
    },
    "sm_90": {
        "attn_decode *bf16:16": ("HMMA", "16-byte loads"),
        "attn_prefill TMA=True": ("HGMMA", "UTMALDG"),
    },
}


def decode(is_fp32: bool, head_dim: int) -> Config:
    """Of attn_decode where nothing was tuned."""
    if is_fp32:
        return Config({"BLOCK_N": 32, "SPLIT": 512}, num_warps=8, num_stages=1)
    if head_dim > 128:
        return Config({"BLOCK_N": 32, "SPLIT": 512}, num_warps=4, num_stages=2)
    return DECODE[0]


def of_selection(decode: Config) -> Config:
    """Of attn_decode over a selection: the same tiles, so the same bits, with fewer in flight: addresses need registers."""
    return Config(decode.tiles, decode.num_warps, min(decode.num_stages, 3))


def prefill(is_fp32: bool, head_dim: int, is_hopper: bool, is_plain: bool) -> Config:
    """Of attn_prefill where nothing was tuned: the most rows a warp that need no stack.

    Plain: 1, 2, 4 .. heads a KV head, no softcap, no int8; the rest takes a few registers more.
    """
    if is_fp32:
        block_n = 16 if head_dim > 128 else 32
        return Config({"BLOCK_M": 64, "BLOCK_N": block_n}, num_warps=8, num_stages=1)
    if head_dim > 128:
        return PREFILL[4]
    if not is_hopper:
        return PREFILL[3] if is_plain else PREFILL[4]
    return PREFILL[0] if is_plain else PREFILL[2]


def fit_boxes(element_bytes: int, block_tokens: int, head_dim: int, block_n: int) -> bool:
    """Whether the tensor memory accelerator can load a tile of K or V as one box: bf16 or fp32, rows of 16 bytes."""
    is_aligned = head_dim >= 16 and head_dim * element_bytes % 16 == 0
    return element_bytes > 1 and is_aligned and block_tokens % block_n == 0
