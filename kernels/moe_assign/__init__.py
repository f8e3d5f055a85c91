"""Which slots meet an expert's matrix together: the work list of a product by many experts.

A slot is a token's k-th choice, t * K + k. `order` holds the slots by expert, those of one expert ascending. A tile is up to
`tile_rows` slots of one expert side by side in `order`: (expert, begin, end), places in `order`. Tiles are in the order of
their slots, each full but an expert's last; what is left of `tiles` is (-1, 0, 0).
Where `tile_rows` is 1 each slot is a tile of its own and nothing needs sorting: nothing is written then, and none may read it.
"""

from typing import Protocol

from vivace.kernels.buffer import Buffer, expect, expect_dtype

TILE_ROWS = (16, 64, 128)
MANY_EXPERTS = 4  # for each slot: then hardly two slots share one


class Run(Protocol):
    """Every backend's `run`: outputs first, written whole, but as said above."""

    def __call__(
        self,
        order_TK: Buffer,  # int32, out
        tiles_TK3: Buffer,  # int32, out: no more tiles than slots
        experts_TK: Buffer,  # int32
        *,
        num_experts: int,
    ) -> None: ...


def check(order_TK: Buffer, tiles_TK3: Buffer, experts_TK: Buffer, *, num_experts: int) -> None:
    """Raise ValueError, with the shapes, if the arguments do not fit together."""
    T, K = expect("experts", experts_TK, None, None)
    expect_dtype("experts", experts_TK, "int32")
    check_assignment(order_TK, tiles_TK3, T, K)
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")


def check_assignment(order_TK: Buffer, tiles_TK3: Buffer, T: int, K: int) -> None:
    """Raise ValueError unless these are for T tokens of K slots."""
    expect("order", order_TK, T, K)
    expect("tiles", tiles_TK3, T, K, 3)
    expect_dtype("order", order_TK, "int32")
    expect_dtype("tiles", tiles_TK3, "int32")


def tile_rows(num_slots: int, num_experts: int) -> int:
    """The most slots of a tile: those of an expert if all were evenly spread, from above. Of the shapes alone."""
    if MANY_EXPERTS * num_slots <= num_experts:
        return 1
    fitting = (rows for rows in TILE_ROWS if num_slots <= rows * num_experts)
    return next(fitting, TILE_ROWS[-1])


def max_tiles(num_slots: int, num_experts: int) -> int:
    """No choice of experts makes more tiles than this."""
    rows = tile_rows(num_slots, num_experts)
    return min(num_slots, (num_slots + num_experts * (rows - 1)) // rows)
