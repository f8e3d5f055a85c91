"""Block-sparse decode: what its ops share. Query-aware selection of KV blocks as in Quest (arXiv:2406.10774), with mean and
standard deviation in place of its corners.

The unit of selection is 16 tokens: a block of the cache, or a part of a larger one; where 16 does not divide the S tokens of a
block, the block. Unit j of a request covers its positions j * U .. j * U + U - 1, U = unit_tokens(S); unit p of the cache, in
block p // (S / U), its slots p * U .. p * U + U - 1. Z = S / U units make a block.

A request is sparse in a layer if its budget (units; 0: dense) is under the number of its units, of which the last may be in
part, and the layer is none of its first `dense_layers`. All others are dense, bit for bit as without these ops. A sparse
request has one row in the step.

The index format: for each request and KV head its units in ascending order, and how many they are; -1 is all.
"""

UNIT_TOKENS = 16
SINK_UNITS = 1  # a request's first units, which are always selected
RECENT_UNITS = 4  # likewise the last ones, the one that is not full included
MIN_BUDGET_UNITS = 8


def unit_tokens(block_tokens: int) -> int:
    """Tokens that are selected together, of blocks of this size."""
    return block_tokens if block_tokens % UNIT_TOKENS else UNIT_TOKENS
