"""The assignment of slots in Triton. Bound by launch and latency: a step's slots are a few kB.

Few slots: one program compares all pairs. Else a program for each expert counts all slots, which says where its own begin,
then places these in a second pass: no atomics, so the order is stable. Limits: what an expert's program reads grows with the
slots, 2 * 4 * T * K bytes; 4,096 tokens of 8 choices are 256 kB, from L2.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vivace.kernels.gpu.launcher import Config, Launcher
from vivace.kernels.moe_assign import tile_rows

MAX_PAIRED = 64  # slots
PAIRED = Config(num_warps=4)
COUNTED = Config({"BLOCK": 1024}, num_warps=4)
CANDIDATES = {"counted": tuple(Config({"BLOCK": n}, num_warps=4) for n in (512, 1024, 2048, 4096))}


@triton.jit
def _store_tiles(
    tiles_ptr,  # int32 [n, 3]
    at,  # which
    expert,
    begin,
    end,
    is_in,
):
    tl.store(tiles_ptr + 3 * at, expert, mask=is_in)
    tl.store(tiles_ptr + 3 * at + 1, begin, mask=is_in)
    tl.store(tiles_ptr + 3 * at + 2, end, mask=is_in)


@triton.jit(do_not_specialize=["n", "rows"])
def _paired(
    order_ptr,  # int32 [n], out
    tiles_ptr,  # int32 [n, 3], out
    experts_ptr,  # int32 [n]
    n,
    rows,  # of a tile, at most
    BLOCK: tl.constexpr,
):
    slot = tl.arange(0, BLOCK)
    is_slot = slot < n
    expert = tl.load(experts_ptr + slot, mask=is_slot, other=0x7FFFFFFF)  # sorts last
    is_same = expert[None, :] == expert[:, None]
    is_earlier = is_same & (slot[None, :] < slot[:, None])
    is_before = is_earlier | (expert[None, :] < expert[:, None])
    place = tl.sum(is_before.to(tl.int32), 1)
    rank = tl.sum(is_earlier.to(tl.int32), 1)
    left = tl.sum(is_same.to(tl.int32), 1) - rank
    is_first = is_slot & (rank % rows == 0)
    tile = tl.sum((is_before & is_first[None, :]).to(tl.int32), 1)
    tl.store(order_ptr + place, slot, mask=is_slot)
    _store_tiles(tiles_ptr, tile, expert, place, place + tl.minimum(left, rows), is_first)
    num_tiles = tl.sum(is_first.to(tl.int32), 0)
    _store_tiles(tiles_ptr, slot, -1, 0, 0, is_slot & (slot >= num_tiles))


@triton.jit(do_not_specialize=["n", "rows"])
def _counted(
    order_ptr,  # int32 [n], out
    tiles_ptr,  # int32 [n, 3], out
    experts_ptr,  # int32 [n]
    n,
    rows,  # of a tile, at most
    E: tl.constexpr,
    BINS: tl.constexpr,  # power of two, E or more
    BLOCK: tl.constexpr,
):
    mine = tl.program_id(0)
    lane = tl.arange(0, BLOCK)
    counts = tl.zeros((BINS,), tl.int32)
    for start in range(0, n, BLOCK):
        is_slot = start + lane < n
        expert = tl.load(experts_ptr + start + lane, mask=is_slot, other=0)
        counts += tl.histogram(expert, BINS, mask=is_slot)
    bins = tl.arange(0, BINS)
    num_tiles = (counts + rows - 1) // rows
    begin = tl.sum(tl.where(bins < mine, counts, 0), 0)
    end = begin + tl.sum(tl.where(bins == mine, counts, 0), 0)
    first_tile = tl.sum(tl.where(bins < mine, num_tiles, 0), 0)
    total = tl.sum(num_tiles, 0)

    place = begin
    for start in range(0, n, BLOCK):
        slot = start + lane
        is_slot = slot < n
        expert = tl.load(experts_ptr + slot, mask=is_slot, other=0)
        is_mine = is_slot & (expert == mine)
        rank = tl.cumsum(is_mine.to(tl.int32), 0) - 1
        tl.store(order_ptr + place + rank, slot, mask=is_mine)
        place += tl.sum(is_mine.to(tl.int32), 0)
    for start in range(begin, end, BLOCK * rows):
        at = start + lane * rows
        tile = first_tile + (at - begin) // rows
        _store_tiles(tiles_ptr, tile, mine, at, tl.minimum(at + rows, end), at < end)
    for start in range(mine * BLOCK, n, E * BLOCK):
        tile = start + lane
        _store_tiles(tiles_ptr, tile, -1, 0, 0, (tile >= total) & (tile < n))


def bind(launcher: Launcher) -> Callable[..., None]:
    """The op on one device."""

    def run(
        order_TK: torch.Tensor,
        tiles_TK3: torch.Tensor,
        experts_TK: torch.Tensor,
        *,
        num_experts: int,
    ) -> None:
        n = experts_TK.numel()
        rows = tile_rows(n, num_experts)
        args = (order_TK, tiles_TK3, experts_TK, n, rows)
        if n == 0 or rows == 1:
            return
        if n <= MAX_PAIRED:
            launcher.launch(_paired, (1,), args, {"BLOCK": MAX_PAIRED}, PAIRED)
            return
        bins = triton.next_power_of_2(num_experts)
        constexprs = {"E": num_experts, "BINS": bins}
        config = launcher.config("moe_assign", "counted", COUNTED)
        launcher.launch(_counted, (num_experts,), args, constexprs, config)

    return run
