"""Attention at the shapes that it is judged by: what is called, over which inputs, and what must come out.

Blocks of 64 tokens in a random order, keys and values random. The ops' own rows are fp32, the cache bf16.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from tests.gpu.bars import figure, judged
from tests.gpu.machine import l2_bytes
from tests.gpu.results import Result
from tests.gpu.setting import TOLERANCE_BF16, Setting, meter_of, relative
from tests.gpu.timing import Call, copies
from vivace.kernels.backend import Ops
from vivace.kernels.buffer import DType
from vivace.kernels.selection import UNIT_TOKENS

Tensor = torch.Tensor


@dataclass(frozen=True)
class Shape:
    """Requests of one context each."""

    name: str
    batch: int
    context: int
    H: int = 32
    G: int = 8
    D: int = 128
    S: int = 64  # tokens of a block

    @property
    def kv_bytes(self) -> int:
        """Of the keys and values of all requests, in bf16."""
        return self.batch * self.context * self.G * self.D * 2 * 2

    @property
    def scale(self) -> float:
        """Of a score."""
        return self.D**-0.5

    def tiny(self) -> "Shape":
        """The same at a size for a rehearsal; long enough that a budget of 8 units is less than all."""
        return Shape(self.name, min(self.batch, 2), 200, H=4, G=2, D=16, S=16)


K = 1024
DECODE = (
    Shape("1 x 32k, 128 MB", 1, 32 * K),
    Shape("8 x 8k, 256 MB", 8, 8 * K),
    Shape("16 x 8k, 512 MB", 16, 8 * K),
    Shape("1 x 128k, 512 MB", 1, 128 * K),
    Shape("32 x 8k, 1 GB", 32, 8 * K),
)
PREFILL = (Shape("4k", 1, 4 * K), Shape("16k", 1, 16 * K))
SPARSE = (Shape("32k", 1, 32 * K), Shape("128k", 1, 128 * K))
BUDGET_TOKENS = 4096
TINY_BUDGET_TOKENS = 8 * UNIT_TOKENS


@dataclass(frozen=True)
class Step:
    """One call's buffers: the last `rows` tokens of each request."""

    shape: Shape
    cache: Tensor
    table_BX: Tensor
    starts: Tensor
    lens_B: Tensor
    q_THD: Tensor
    out_THD: Tensor

    def run(self, ops: Ops, selected: tuple[Tensor, Tensor] | None = None) -> None:
        """Attention as an op."""
        more = () if selected is None else (None, *selected)
        ops.attention(
            self.out_THD,
            self.q_THD,
            self.cache,
            self.table_BX,
            self.starts,
            self.lens_B,
            *more,
            num_kv_heads=self.shape.G,
            scale=self.shape.scale,
        )


def step(ops: Ops, shape: Shape, device: str, rows: int = 1) -> Step:
    """Random inputs."""
    columns = -(-shape.context // shape.S)
    cache: Any = ops.memory.kv_cache(shape.batch * columns, shape.S, shape.G, shape.D, DType.BF16)
    cache.normal_()
    order = torch.randperm(shape.batch * columns, device=device, dtype=torch.int32)
    starts = torch.arange(shape.batch + 1, device=device, dtype=torch.int32) * rows
    lens = torch.full((shape.batch,), shape.context, device=device, dtype=torch.int32)
    q = torch.randn(shape.batch * rows, shape.H, shape.D, device=device)
    return Step(shape, cache, order.view(shape.batch, -1), starts, lens, q, torch.empty_like(q))


def by_token(cache: Tensor, S: int) -> Tensor:
    """[N, 2, S, G, D] of a cache of any backend made of torch tensors; S must not be the number of KV heads."""
    return cache if cache.shape[2] == S else cache.transpose(2, 3)


def keys_values(made: Step, b: int) -> Tensor:
    """[2, context, G, D] of a request, in the order of its tokens."""
    blocks = by_token(made.cache, made.shape.S)[made.table_BX[b].long()]
    return blocks.transpose(0, 1).flatten(1, 2)[:, : made.shape.context]


def expected(made: Step, b: int, rows: Tensor, kept_GL: Tensor | None = None) -> Tensor:
    """fp32 attention of these of a request's positions, [rows, H, D]; `kept_GL`: what each KV head may see."""
    shape = made.shape
    k, v = keys_values(made, b)
    first = shape.context - len(made.q_THD) // shape.batch
    q = made.q_THD[b * (shape.context - first) + rows - first].to(k.dtype).float()
    q_GCRD = q.unflatten(1, (shape.G, -1)).permute(1, 2, 0, 3)
    k_GLD, v_GLD = (x.transpose(0, 1).float() for x in (k, v))
    scores = q_GCRD @ k_GLD[:, None].transpose(2, 3) * shape.scale
    hidden = torch.arange(shape.context, device=q.device) > rows[:, None]
    if kept_GL is not None:
        hidden = hidden | ~kept_GL[:, None, None]
    out = scores.masked_fill(hidden, -torch.inf).softmax(3) @ v_GLD[:, None]
    return out.permute(2, 0, 1, 3).flatten(1, 2)


def decode(setting: Setting, shape: Shape) -> Iterator[Result]:
    """One row for each request."""
    shape = shape.tiny() if setting.is_tiny else shape
    ops = setting.ops()
    count = copies(shape.kv_bytes, l2_bytes(setting.device))
    steps = [step(ops, shape, setting.device) for _ in range(count)]
    calls = [partial(one.run, ops) for one in steps]
    timing = meter_of(setting, ops).times({"": calls})[""]
    last = torch.tensor([shape.context - 1], device=setting.device)
    error = max(
        relative(steps[0].out_THD[b][None], expected(steps[0], b, last))
        for b in range(0, shape.batch, max(1, shape.batch // 2))
    )
    found = figure(f"decode/{shape.name}", timing, work=shape.kv_bytes, of="copy")
    yield judged(found, setting.ceilings, error=error, tolerance=TOLERANCE_BF16)


def prefill(setting: Setting, shape: Shape) -> Iterator[Result]:
    """A whole prompt in one chunk."""
    shape = shape.tiny() if setting.is_tiny else shape
    ops = setting.ops()
    touched = shape.kv_bytes + 2 * 4 * shape.context * shape.H * shape.D
    count = copies(touched, l2_bytes(setting.device))
    steps = [step(ops, shape, setting.device, rows=shape.context) for _ in range(count)]
    calls: list[Call] = [partial(one.run, ops) for one in steps]
    timing = meter_of(setting, ops).times({"": calls})[""]
    rows = torch.tensor([0, 1, shape.context // 3, shape.context - 1], device=setting.device)
    error = relative(steps[0].out_THD[rows], expected(steps[0], 0, rows))
    found = figure(f"prefill/{shape.name}", timing, work=causal_flops(shape), of="product")
    yield judged(found, setting.ceilings, error=error, tolerance=TOLERANCE_BF16)


def causal_flops(shape: Shape) -> float:
    """Of the two products, over the lower triangle."""
    return 2 * 2 * shape.H * shape.D * shape.context**2 / 2


@dataclass(frozen=True)
class Sparse:
    """A decode step that selects: scoring, top-k, attention. The metadata were made before."""

    step: Step
    meta: Tensor
    scores_BGXZ: Tensor
    selected_BGXZ: Tensor
    num_selected_BG: Tensor
    budgets_B: Tensor
    dense_layers_B: Tensor

    def run(self, ops: Ops) -> None:
        """All that a layer does for it."""
        self.choose(ops)
        self.step.run(ops, (self.selected_BGXZ, self.num_selected_BG))

    def choose(self, ops: Ops) -> None:
        """Score and select."""
        made, shape = self.step, self.step.shape
        who = made.lens_B, self.budgets_B, self.dense_layers_B
        ops.block_score(
            self.scores_BGXZ,
            made.q_THD,
            self.meta,
            made.table_BX,
            made.starts,
            *who,
            layer=0,
            scale=shape.scale,
            block_tokens=shape.S,
        )
        ops.block_topk(
            self.selected_BGXZ,
            self.num_selected_BG,
            self.scores_BGXZ,
            *who,
            layer=0,
            block_tokens=shape.S,
        )


def sparse_step(ops: Ops, shape: Shape, device: str, budget_tokens: int) -> Sparse:
    """Random inputs, and their metadata by the op."""
    made = step(ops, shape, device)
    num_units = made.table_BX.numel() * shape.S // UNIT_TOKENS
    meta = torch.empty(num_units, shape.G, 2, shape.D, dtype=torch.bfloat16, device=device)
    units = torch.arange(num_units, dtype=torch.int32, device=device)
    ops.block_meta_update(meta, made.cache, units, block_tokens=shape.S)
    B, X = made.table_BX.shape
    scores = torch.empty(B, shape.G, X, shape.S // UNIT_TOKENS, device=device)
    selected = torch.empty_like(scores, dtype=torch.int32)
    num_selected = torch.empty(B, shape.G, dtype=torch.int32, device=device)
    budgets = torch.full_like(made.lens_B, budget_tokens // UNIT_TOKENS)
    layers = torch.zeros_like(made.lens_B)
    return Sparse(made, meta, scores, selected, num_selected, budgets, layers)


def sparse(setting: Setting, shape: Shape) -> Iterator[Result]:
    """Selecting beside reading everything, the same caches."""
    shape = shape.tiny() if setting.is_tiny else shape
    budget = TINY_BUDGET_TOKENS if setting.is_tiny else BUDGET_TOKENS
    ops = setting.ops()
    touched = shape.kv_bytes * budget // shape.context + shape.kv_bytes // UNIT_TOKENS
    count = copies(touched, l2_bytes(setting.device))
    steps = [sparse_step(ops, shape, setting.device, budget) for _ in range(count)]
    times = meter_of(setting, ops).times(
        {
            "dense": [partial(one.step.run, ops) for one in steps],
            "sparse": [partial(one.run, ops) for one in steps],
        }
    )
    found = figure(f"sparse/{shape.name}", times["sparse"], work=touched, of="dense")
    dense = figure(f"sparse/{shape.name}, dense", times["dense"], work=shape.kv_bytes, of="copy")
    yield judged(dense, setting.ceilings, error=None, tolerance=0.0)
    yield judged(
        found,
        setting.ceilings,
        error=_sparse_error(steps[0], ops, budget // UNIT_TOKENS),
        tolerance=TOLERANCE_BF16,
        dense_us=times["dense"].us,
    )


def _sparse_error(one: Sparse, ops: Ops, budget: int) -> float:
    """Against attention over what it says it selected; infinite unless that is as many units as it may be."""
    one.run(ops)
    shape = one.step.shape
    if not bool((one.num_selected_BG == budget).all()):
        return float("inf")
    units = one.selected_BGXZ[0].flatten(1)[:, :budget].long()
    kept = torch.zeros(shape.G, -(-shape.context // UNIT_TOKENS), dtype=torch.bool)
    kept = kept.to(units.device).scatter(1, units, True)
    if int(kept.sum()) != shape.G * budget:
        return float("inf")
    kept_GL = kept.repeat_interleave(UNIT_TOKENS, 1)[:, : shape.context]
    last = torch.tensor([shape.context - 1], device=units.device)
    return relative(one.step.out_THD, expected(one.step, 0, last, kept_GL))
