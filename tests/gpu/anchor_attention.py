"""What attention on a device must do to the last bit: read what is its own alone, whatever else is computed with it.

Each request's keys and values are drawn once; a test lays them into caches that differ in everything that must not matter.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from tests.gpu.load_attention import by_token
from tests.gpu.results import Result
from tests.gpu.setting import TOLERANCE_BF16, Part, Setting, relative
from tests.gpu.timing import Replay
from vivace.kernels.backend import Ops
from vivace.kernels.buffer import DType

Tensor = torch.Tensor
NOWHERE = 2**30  # a block number that faults if it is read


@dataclass(frozen=True)
class Batch:
    """Requests, and how many of their last tokens are this step's rows."""

    k: tuple[Tensor, ...]  # [context, G, D] each
    v: tuple[Tensor, ...]
    q: tuple[Tensor, ...]  # [rows, H, D] each
    S: int
    dtype: DType
    window: int = 0

    def picked(self, requests: Sequence[int]) -> "Batch":
        """Some of them."""
        k, v, q = ([group[i] for i in requests] for group in (self.k, self.v, self.q))
        return replace(self, k=tuple(k), v=tuple(v), q=tuple(q))

    def chunk(self, begin: int, end: int) -> "Batch":
        """These rows of its one request, when no later ones were there."""
        [k], [v], [q] = self.k, self.v, self.q
        context = len(k) - len(q) + end
        return replace(self, k=(k[:context],), v=(v[:context],), q=(q[begin:end],))


def batch(
    setting: Setting, contexts: Sequence[int], rows: Sequence[int], dtype: DType, window: int = 0
) -> Batch:
    """Random requests of 8 query heads on 2, of 64 or in a rehearsal 16."""
    D, S = (16, 16) if setting.is_tiny else (64, 64)
    make = partial(torch.randn, device=setting.device)
    return Batch(
        tuple(make(n, 2, D) for n in contexts),
        tuple(make(n, 2, D) for n in contexts),
        tuple(make(n, 8, D) for n in rows),
        S,
        dtype,
        window,
    )


@dataclass(frozen=True)
class Laid:
    """A batch in a cache."""

    out_THD: Tensor
    args: tuple[Tensor, ...]
    attrs: Mapping[str, Any]

    def run(self, ops: Ops) -> Tensor:
        """The rows, from an output full of NaN."""
        self.out_THD.fill_(torch.nan)
        self.launch(ops)
        return self.out_THD

    def launch(self, ops: Ops) -> None:
        """The op alone."""
        ops.attention(self.out_THD, *self.args, **self.attrs)


def laid(ops: Ops, made: Batch, *, seed: int = 0, unused: float = 0.0, spare: int = 3) -> Laid:
    """The batch in blocks of an order by `seed`, among `spare` ones; `unused` fills whatever nobody wrote.

    Table entries past a request's last block, and those wholly left of its window, lead nowhere.
    """
    S, device = made.S, made.q[0].device
    counts = [-(-len(k) // S) for k in made.k]
    _, G, D = made.k[0].shape
    cache: Any = ops.memory.kv_cache(sum(counts) + spare, S, G, D, made.dtype)
    cache.fill_(unused)
    generator = torch.Generator().manual_seed(seed)
    free = torch.randperm(len(cache), generator=generator).to(device)
    table = torch.full((len(counts), max(counts) + 1), NOWHERE, dtype=torch.int32, device=device)
    view = by_token(cache, S)
    for b, (k, v, q) in enumerate(zip(made.k, made.v, made.q, strict=True)):
        blocks, free = free[: counts[b]], free[counts[b] :]
        left = max(0, len(k) - len(q) - made.window + 1) if made.window else 0
        at = torch.arange(left, len(k), device=device)
        view[blocks[at // S], 0, at % S] = k[left:].to(cache.dtype)
        view[blocks[at // S], 1, at % S] = v[left:].to(cache.dtype)
        table[b, left // S : counts[b]] = blocks[left // S :].int()
    starts = [0]
    for q in made.q:
        starts.append(starts[-1] + len(q))
    ints = partial(torch.tensor, dtype=torch.int32, device=device)
    rows = torch.cat(made.q)
    args = rows, cache, table, ints(starts), ints([len(k) for k in made.k])
    attrs = {"num_kv_heads": G, "scale": D**-0.5, "window": made.window}
    return Laid(torch.empty_like(rows), args, attrs)


CONTEXTS, ROWS = (257, 31, 256, 600, 1, 64), (1, 1, 7, 64, 1, 1)


def nothing_else_is_read(setting: Setting, dtype: DType, window: int) -> Iterator[Result]:
    """NaN wherever nobody wrote, another order of blocks, another step before: the same bits."""
    made, ops = batch(setting, CONTEXTS, ROWS, dtype, window), setting.ops()
    name = f"anchors/attention, {dtype.value}, window {window}"
    plain = laid(ops, made).run(ops).clone()
    yield bits(f"{name}: NaN in unused memory", plain, laid(ops, made, unused=torch.nan).run(ops))
    other = laid(ops, made, seed=1, spare=11, unused=torch.nan)
    yield bits(f"{name}: blocks in another order", plain, other.run(ops))
    yield bits(f"{name}: run twice", plain, other.run(ops))
    fresh = setting.ops()
    yield bits(f"{name}: fresh scratch", plain, other.run(fresh))


def each_row_is_alone(setting: Setting, dtype: DType) -> Iterator[Result]:
    """A request in a batch, alone, and in another place of another batch."""
    made, ops = batch(setting, CONTEXTS, ROWS, dtype), setting.ops()
    whole = laid(ops, made).run(ops).split(ROWS)
    alone = [laid(ops, made.picked([b]), seed=b).run(ops).clone() for b in range(len(ROWS))]
    name = f"anchors/attention, {dtype.value}"
    yield bits(f"{name}: a request in a batch = alone", torch.cat(whole), torch.cat(alone))
    turned = made.picked([5, 3, 1, 4, 2, 0])
    back = laid(ops, turned).run(ops).split([ROWS[i] for i in (5, 3, 1, 4, 2, 0)])
    ordered = torch.cat([back[i] for i in (5, 2, 4, 1, 3, 0)])
    yield bits(f"{name}: requests in another order", torch.cat(whole), ordered)


def chunks_do_not_matter(setting: Setting, dtype: DType) -> Iterator[Result]:
    """A prompt in one chunk and cut: to the bit where one kernel does all, nearly where the other one helps with few rows."""
    made, ops = batch(setting, (300,), (300,), dtype), setting.ops()
    whole = laid(ops, made).run(ops)
    name = f"anchors/attention, {dtype.value}: chunks"
    yield product_bits(setting, f"{name} = whole", whole, _in_chunks(ops, made, (0, 65, 192, 300)))
    error = relative(_in_chunks(ops, made, (0, 1, 65, 192, 193, 300)), whole)
    tolerance = 1e-5 if dtype is DType.FP32 else TOLERANCE_BF16
    yield Result(f"{name}, some of one row", error <= tolerance, error)


def _in_chunks(ops: Ops, made: Batch, cuts: Sequence[int]) -> Tensor:
    pieces = [laid(ops, made.chunk(a, b), seed=a).run(ops).clone() for a, b in pairwise(cuts)]
    return torch.cat(pieces)


def a_graph_follows_its_buffers(setting: Setting, dtype: DType) -> Iterator[Result]:
    """Captured once; lengths, tables and rows change in place; each replay equals a plain call."""
    name = f"anchors/attention, {dtype.value}: a graph with other lengths"
    ops = setting.ops()
    most = (700, 257, 64, 512)
    first = laid(ops, batch(setting, most, (1, 1, 1, 1), dtype))
    replay = Replay(partial(first.launch, ops), setting.device)
    rows, _, table, _, lens = first.args
    tables, mosts = table.clone(), lens.clone()
    for i, contexts in enumerate((most, (1, 600, 255, 3), (256, 2, 512, 130))):
        shorter = torch.tensor(contexts, dtype=torch.int32, device=setting.device)
        table.copy_(tables.roll(i, 0))
        lens.copy_(torch.minimum(shorter, mosts.roll(i, 0)))
        rows.copy_(torch.randn_like(rows))
        first.out_THD.fill_(torch.nan)
        replay()
        replayed = first.out_THD.clone()
        yield bits(f"{name}, replay {i}", replayed, first.run(setting.ops()))


def bits(name: str, first: Tensor, second: Tensor) -> Result:
    """Whether both are the same to the last bit, and numbers."""
    is_same = torch.equal(first, second) and bool(torch.isfinite(first).all())
    count = int((first != second).sum())
    return Result(name, is_same, note="" if is_same else f"{count} of {first.numel()} differ")


def product_bits(setting: Setting, name: str, first: Tensor, second: Tensor) -> Result:
    """Likewise of rows elsewhere in a tile. The interpreter's products, NumPy's, add up by the place in it: nearly."""
    if setting.is_gpu:
        return bits(name, first, second)
    error = relative(first, second)
    return Result(name, error <= 1e-2, error, note="rehearsed: not to the bit")


def parts() -> Mapping[str, Part]:
    """By name."""
    found: dict[str, Part] = {}
    for dtype in (DType.FP32, DType.BF16):
        for window in (0, 100):
            name = f"attention reads nothing else, {dtype.value}, window {window}"
            found[name] = partial(nothing_else_is_read, dtype=dtype, window=window)
        for part in (each_row_is_alone, chunks_do_not_matter, a_graph_follows_its_buffers):
            found[f"attention, {dtype.value}: {part.__name__}"] = partial(part, dtype=dtype)
    return found
