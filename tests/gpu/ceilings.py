"""What this card can do, measured in the run whose shares are taken of it: copying, reading, a bf16 product.

Bytes of the copy are those read and those written. The copy and the read stream are the fastest of a few ways.
"""

from collections.abc import Iterator
from functools import partial

import torch
import triton
import triton.language as tl

from tests.gpu.results import Result
from tests.gpu.setting import Setting
from tests.gpu.timing import Meter, Timing

GIB = 1 << 30
READ_BYTES = 4 * GIB
READS = ((4096, 4, 8), (4096, 8, 4), (8192, 8, 4), (2048, 4, 16))  # words, warps, programs per SM
PRODUCT = 8192


@triton.jit
def _sum_words(
    words,  # int32 [num_tiles * TILE]
    sums,  # int32 [programs]
    num_tiles,
    TILE: tl.constexpr,
):
    """Read-bound: every program walks its share of the tiles and writes one number."""
    total = tl.zeros([TILE], tl.int32)
    places = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    for _ in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        total += tl.load(words + places, eviction_policy="evict_first")
        places += tl.num_programs(0) * TILE
    tl.store(sums + tl.program_id(0), tl.sum(total))


def copy(setting: Setting) -> Iterator[Result]:
    """An elementwise kernel over 1 GiB, its result written elsewhere."""
    count = 4096 if setting.is_tiny else GIB // 4
    source = torch.randint(-(2**31), 2**31 - 1, (count,), dtype=torch.int32, device=setting.device)
    target = torch.empty_like(source)
    wide, wide_target = source.view(torch.int64), target.view(torch.int64)
    meter = Meter(setting.device, lambda: None)
    times = meter.times(
        {
            "copy/int32": [partial(torch.bitwise_not, source, out=target)],
            "copy/int64": [partial(torch.bitwise_not, wide, out=wide_target)],
        }
    )
    is_right = torch.equal(target, ~source)
    for name, timing in times.items():
        yield ceiling(name, timing, 2 * 4 * count, is_right)
    yield ceiling("copy", _fastest(times), 2 * 4 * count, is_right)


def read(setting: Setting) -> Iterator[Result]:
    """A stream that is read once."""
    count = 16384 if setting.is_tiny else READ_BYTES // 4
    words = torch.randint(0, 256, (count,), dtype=torch.int32, device=setting.device)
    units = 1
    if setting.device.startswith("cuda"):
        units = torch.cuda.get_device_properties(setting.device).multi_processor_count
    calls, right = {}, []
    for tile, warps, per_unit in READS:
        sums = torch.zeros(units * per_unit, dtype=torch.int32, device=setting.device)
        run = partial(
            _sum_words[(len(sums),)], words, sums, count // tile, TILE=tile, num_warps=warps
        )
        run()
        right.append(sums.sum(dtype=torch.int64).item() == words.sum(dtype=torch.int64).item())
        calls[f"read/{tile} words, {warps} warps, {per_unit} a unit"] = [run]
    times = Meter(setting.device, lambda: None).times(calls)
    yield ceiling("read", _fastest(times), 4 * count, all(right))


def product(setting: Setting) -> Iterator[Result]:
    """A square bf16 product of random numbers, through torch."""
    n = 64 if setting.is_tiny else PRODUCT
    make = partial(torch.randn, n, n, dtype=torch.bfloat16, device=setting.device)
    calls = []
    for _ in range(2):
        a, b, out = make(), make(), make()
        calls.append(partial(torch.mm, a, b.t(), out=out))
    timing = Meter(setting.device, lambda: None).times({"product": calls})["product"]
    want = a[:4].float() @ b.float().t()
    is_right = bool((out[:4].float() - want).norm() <= 1e-2 * want.norm())
    yield ceiling("product", timing, 2 * n**3, is_right)


def ceiling(name: str, timing: Timing, work: int, is_right: bool) -> Result:
    """A rate that others are shares of."""
    return Result(
        f"ceilings/{name}",
        is_right,
        us=timing.us,
        p5_us=timing.p5_us,
        p95_us=timing.p95_us,
        rate=work / timing.us * 1e6,
    )


def _fastest(times: dict[str, Timing]) -> Timing:
    return min(times.values(), key=lambda timing: timing.us)


CEILINGS = {"copy": copy, "read": read, "product": product}
