"""Which units a sparse request attends to: its first and last ones, and of the others the best by score, as many as its budget.

Exact; ties go to the lower unit, NaN is below -inf. See `kernels.selection` for the index format and who is sparse: of others,
`num_selected` is -1 and `selected` not written. A budget is at least MIN_BUDGET_UNITS, so the first SINK_UNITS and the last
RECENT_UNITS are always within it.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype
from vivace.kernels.selection import unit_tokens


class Run(Protocol):
    """Every backend's `run`: outputs first."""

    def __call__(
        self,
        selected_BGXZ: Buffer,  # int32, out: units of the request, ascending; of each row the first num_selected
        num_selected_BG: Buffer,  # int32, out, written whole
        scores_BGXZ: Buffer,  # fp32, from block_score
        context_lens_B: Buffer,  # int32
        budgets_B: Buffer,  # int32, units; 0: dense
        dense_layers_B: Buffer,  # int32
        *,
        layer: int,
        block_tokens: int,  # S
    ) -> None: ...


def check(
    selected_BGXZ: Buffer,
    num_selected_BG: Buffer,
    scores_BGXZ: Buffer,
    context_lens_B: Buffer,
    budgets_B: Buffer,
    dense_layers_B: Buffer,
    *,
    layer: int,
    block_tokens: int,
) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    Z = block_tokens // unit_tokens(block_tokens)
    B, G, _, _ = expect("scores", scores_BGXZ, None, None, None, Z)
    expect("selected", selected_BGXZ, *scores_BGXZ.shape)
    expect("num_selected", num_selected_BG, B, G)
    for name, buffer in (
        ("context_lens", context_lens_B),
        ("budgets", budgets_B),
        ("dense_layers", dense_layers_B),
    ):
        expect(name, buffer, B)
        expect_dtype(name, buffer, "int32")
    expect_dtype("selected", selected_BGXZ, "int32")
    expect_dtype("num_selected", num_selected_BG, "int32")
    expect_dtype("scores", scores_BGXZ, "float32")
    if layer < 0:
        raise ValueError(f"layer must be at least 0, got {layer}")
