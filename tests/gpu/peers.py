"""What else there is, timed as our own ops are: torch's attention and grouped products, FlashInfer where it can be imported.

A peer that is not there, or does not run here, says so and fails nothing: `bars.beside_peers` asks for one at least. Each
result is checked once before it counts. Peers get bf16 rows; ours are fp32.
"""

import importlib
import importlib.util
import math
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from tests.gpu import load_moe, load_sampling
from tests.gpu.bars import figure, judged
from tests.gpu.load_attention import DECODE, PREFILL, Shape, causal_flops
from tests.gpu.load_moe import Experts
from tests.gpu.load_sampling import KINDS, Kind
from tests.gpu.machine import l2_bytes
from tests.gpu.results import Result
from tests.gpu.setting import TOLERANCE_BF16, Part, Setting, relative, unsealed
from tests.gpu.timing import Call, copies

Tensor = torch.Tensor
BF16 = torch.bfloat16
BLOCK = 64
COMPARED = ("1 x 32k, 128 MB", "16 x 8k, 512 MB", "1 x 128k, 512 MB")  # the last beside sparse
WORKSPACE = 256 << 20
CHECKED_ROWS = 8
PROBLEMS = (  # of what is not there or does not run here; what hangs is stopped from outside
    ImportError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    OSError,
    subprocess.SubprocessError,
)


@dataclass(frozen=True)
class Peer:
    """Calls over other inputs each, and how far the first one's result is from what it should be."""

    calls: Sequence[Call]
    error: Callable[[], float]


def measured(
    setting: Setting,
    name: str,
    make: Callable[[], Peer],
    *,
    work: float | None = None,
    of: str = "",
) -> Iterator[Result]:
    """A peer's figure, or that there is none and why."""
    try:
        peer = make()
        error = peer.error()
        timing = unsealed(setting).times({"": peer.calls})[""]
    except PROBLEMS as problem:
        why = f"{type(problem).__name__}: {problem}".splitlines()[0][:160]
        yield Result(name, None, note=f"absent: {why}")
        return
    found = figure(name, timing, work=work, of=of)
    yield judged(found, setting.ceilings, error=error, tolerance=TOLERANCE_BF16)


@dataclass(frozen=True)
class Dense:
    """Contiguous keys and values, [B, G, L, D], and rows [B, H, R, D]."""

    shape: Shape
    q: Tensor
    k: Tensor
    v: Tensor


def dense(shape: Shape, device: str, rows: int) -> Dense:
    """Random."""
    make = partial(torch.randn, dtype=BF16, device=device)
    kv = shape.batch, shape.G, shape.context, shape.D
    return Dense(shape, make(shape.batch, shape.H, rows, shape.D), make(*kv), make(*kv))


def expected(one: Dense, rows: Tensor) -> Tensor:
    """fp32 attention of the first request's rows, [H, rows, D]; the last row is the last position."""
    shape = one.shape
    first = shape.context - one.q.shape[2]
    k, v = (x[0].float()[:, None] for x in (one.k, one.v))
    q = one.q[0][:, rows].float().unflatten(0, (shape.G, -1))
    scores = q @ k.transpose(2, 3) * shape.scale
    hidden = torch.arange(shape.context, device=rows.device) > (first + rows)[:, None]
    return (scores.masked_fill(hidden, -torch.inf).softmax(3) @ v).flatten(0, 1)


def _sets(setting: Setting, shape: Shape, rows: int) -> list[Dense]:
    touched = shape.kv_bytes + 2 * 2 * shape.batch * rows * shape.H * shape.D
    count = copies(touched, l2_bytes(setting.device))
    return [dense(shape, setting.device, rows) for _ in range(count)]


def _checked_rows(one: Dense) -> Tensor:
    count = one.q.shape[2]
    return torch.tensor(sorted({0, count // 3, count - 1}), device=one.q.device)


def sdpa(sets: Sequence[Dense], backend: SDPBackend, *, is_causal: bool) -> Peer:
    """torch's, by one of its backends."""

    def run(one: Dense) -> Tensor:
        with sdpa_kernel(backend):
            return functional.scaled_dot_product_attention(
                one.q, one.k, one.v, is_causal=is_causal, enable_gqa=True, scale=one.shape.scale
            )

    rows = _checked_rows(sets[0])
    return Peer(
        [partial(run, one) for one in sets],
        lambda: relative(run(sets[0])[0][:, rows], expected(sets[0], rows)),
    )


def flex(sets: Sequence[Dense]) -> Peer:
    """torch's compiled attention with a causal mask, or for one row with none."""
    one = sets[0]
    R, L, device = one.q.shape[2], one.shape.context, str(one.q.device)
    mask = None
    if R > 1:
        mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, R, L, device=device)
    is_gpu = one.q.is_cuda
    compiled: Any = torch.compile(flex_attention, dynamic=False) if is_gpu else flex_attention

    def run(one: Dense) -> Tensor:
        out: Tensor = compiled(
            one.q, one.k, one.v, block_mask=mask, enable_gqa=True, scale=one.shape.scale
        )
        return out

    rows = _checked_rows(one)
    return Peer(
        [partial(run, one) for one in sets],
        lambda: relative(run(sets[0])[0][:, rows], expected(sets[0], rows)),
    )


TORCH_DECODE = {"SDPA cuDNN": SDPBackend.CUDNN_ATTENTION, "SDPA flash": SDPBackend.FLASH_ATTENTION}


def decode(setting: Setting, shape: Shape) -> Iterator[Result]:
    """One row for each request, all of the context."""
    shape = shape.tiny() if setting.is_tiny else shape
    name = f"peers/decode/{shape.name}"
    sets = _sets(setting, shape, 1)
    work = {"work": float(shape.kv_bytes), "of": "copy"}
    for backend, kind in TORCH_DECODE.items():
        make = partial(sdpa, sets, kind, is_causal=False)
        yield from measured(setting, f"{name}/{backend}, dense cache", make, **work)
    yield from measured(setting, f"{name}/flex_attention, dense cache", partial(flex, sets), **work)


def paged_decode(setting: Setting, shape: Shape) -> Iterator[Result]:
    """Likewise of a paged cache: FlashInfer's, which may have to be built first."""
    shape = shape.tiny() if setting.is_tiny else shape
    name, work = f"peers/decode/{shape.name}", {"work": float(shape.kv_bytes), "of": "copy"}
    for uses_tensor_cores in (True, False):
        make = partial(flashinfer_decode, setting, shape, uses_tensor_cores)
        with_or_without = "with" if uses_tensor_cores else "without"
        at = f"{name}/FlashInfer {with_or_without} tensor cores, blocks of {BLOCK}"
        yield from measured(setting, at, make, **work)


def flashinfer() -> Any:
    """Its package."""
    if importlib.util.find_spec("flashinfer") is None:
        raise ImportError("flashinfer cannot be imported")
    return importlib.import_module("flashinfer")


def flashinfer_decode(setting: Setting, shape: Shape, uses_tensor_cores: bool) -> Peer:
    """Its paged decode over a cache of our layout: a block's K or V of a head lie side by side."""
    package, device = flashinfer(), setting.device
    columns = -(-shape.context // BLOCK)
    num_blocks = shape.batch * columns
    workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
    runs: list[Callable[[], Tensor]] = []
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    for _ in range(copies(shape.kv_bytes, l2_bytes(device))):
        cache = torch.randn(num_blocks, 2, shape.G, BLOCK, shape.D, dtype=BF16, device=device)
        order = torch.randperm(num_blocks, device=device, dtype=torch.int32)
        q = torch.randn(shape.batch, shape.H, shape.D, dtype=BF16, device=device)
        wrapper = package.BatchDecodeWithPagedKVCacheWrapper(
            workspace, "HND", use_tensor_cores=uses_tensor_cores
        )
        wrapper.plan(
            torch.arange(shape.batch + 1, dtype=torch.int32) * columns,
            order,
            torch.full((shape.batch,), (shape.context - 1) % BLOCK + 1, dtype=torch.int32),
            shape.H,
            shape.G,
            shape.D,
            BLOCK,
            q_data_type=BF16,
            kv_data_type=BF16,
        )
        runs.append(partial(wrapper.run, q, cache))
        kept.append((q, cache, order))

    def error() -> float:
        q, cache, order = kept[0]
        blocks = cache[order[:columns].long()].transpose(0, 1).transpose(1, 2).flatten(2, 3)
        k, v = blocks[:, None, :, : shape.context]
        one = Dense(shape, q[:1, :, None], k, v)
        last = torch.zeros(1, dtype=torch.int64, device=device)
        return relative(runs[0]()[0][:, None], expected(one, last))

    return Peer(runs, error)


def prefill(setting: Setting, shape: Shape) -> Iterator[Result]:
    """A prompt's causal attention."""
    shape = shape.tiny() if setting.is_tiny else shape
    name, sets = f"peers/prefill/{shape.name}", _sets(setting, shape, shape.context)
    work = {"work": causal_flops(shape), "of": "product"}
    yield from measured(setting, f"{name}/flex_attention", partial(flex, sets), **work)
    for backend, kind in TORCH_DECODE.items():
        make = partial(sdpa, sets, kind, is_causal=True)
        yield from measured(setting, f"{name}/{backend}", make, **work)


def flashinfer_prefills(setting: Setting, shape: Shape) -> Iterator[Result]:
    """Likewise by FlashInfer."""
    shape = shape.tiny() if setting.is_tiny else shape
    name, sets = f"peers/prefill/{shape.name}/FlashInfer", _sets(setting, shape, shape.context)
    make = partial(flashinfer_prefill, sets)
    yield from measured(setting, name, make, work=causal_flops(shape), of="product")


def flashinfer_prefill(sets: Sequence[Dense]) -> Peer:
    """Its attention of one prompt."""
    package = flashinfer()
    rows = _checked_rows(sets[0])
    calls = [
        partial(
            package.single_prefill_with_kv_cache,
            *(x[0].transpose(0, 1).contiguous() for x in (one.q, one.k, one.v)),
            causal=True,
        )
        for one in sets
    ]
    return Peer(
        calls,
        lambda: relative(calls[0]()[rows].transpose(0, 1), expected(sets[0], rows)),
    )


@dataclass(frozen=True)
class Routed:
    """Rows sorted by expert, and where each expert's end."""

    x: Tensor
    rows: Tensor  # [T * K, M]
    ends: Tensor
    first_token: Tensor  # experts and weights of token 0, for the check
    places: Tensor  # of token 0's slots among the rows


def moe(setting: Setting, T: int) -> Iterator[Result]:
    """The two grouped products and the activation alone: neither routing nor sorting nor the sum, which ours include."""
    made = load_moe.experts(setting.device, BF16, is_tiny=setting.is_tiny)
    name, size = f"peers/moe/{T}", min(T, 40) if setting.is_tiny else T
    per_call = min(size * made.K, len(made.down)) * made.bytes_each
    count = max(4, min(load_moe.MAX_SETS, copies(per_call, l2_bytes(setting.device))))
    x = torch.randn(size, made.down.shape[1], device=setting.device, dtype=BF16)
    routed = [_routed(made, x, logits) for logits in load_moe.routings(made, size, count)]
    distinct = sum(int((one.ends.diff(prepend=one.ends[:1] * 0) > 0).sum()) for one in routed)
    num_bytes = distinct / count * made.bytes_each
    flops = size * made.K * 2 * made.bytes_each / made.down.element_size()
    by_arithmetic = f"moe/{T}" in load_moe.OF_PRODUCT
    work, of = (flops, "product") if by_arithmetic else (num_bytes, "copy")
    make = partial(grouped, made, routed)
    yield from measured(setting, f"{name}/grouped_mm, products alone", make, work=work, of=of)


def _routed(made: Experts, x: Tensor, logits: Tensor) -> Routed:
    chosen = logits.topk(made.K).indices
    slots = chosen.flatten()
    order = slots.argsort(stable=True)
    ends = slots.bincount(minlength=len(made.down)).cumsum(0).int()
    places = order.argsort()[: made.K]
    return Routed(x, x[order // made.K].contiguous(), ends, chosen[0], places)


def grouped(made: Experts, routed: Sequence[Routed]) -> Peer:
    """torch's grouped product, twice."""
    gate_up, down = made.gate_up.transpose(1, 2), made.down.transpose(1, 2)

    def run(one: Routed) -> Tensor:
        gate, up = torch._grouped_mm(one.rows, gate_up, offs=one.ends).chunk(2, dim=1)
        return torch._grouped_mm(functional.silu(gate) * up, down, offs=one.ends)

    def error() -> float:
        one = routed[0]
        want = []
        for e in one.first_token:
            gate, up = (made.gate_up[e].float() @ one.x[0].float()).chunk(2)
            want.append(made.down[e].float() @ (functional.silu(gate) * up))
        return relative(run(one)[one.places], torch.stack(want))

    return Peer([partial(run, one) for one in routed], error)


def sampling(setting: Setting, kind: Kind) -> Iterator[Result]:
    """A token from each row of logits."""
    name, logits = f"peers/sampling/{kind.name}", load_sampling.rows(setting)
    for title, draw in (
        ("torch, sorted" if kind.top_k else "torch, exponential noise", torch_draw),
        ("FlashInfer", flashinfer_draw),
    ):
        make = partial(_drawn, kind, logits, partial(draw, kind))
        yield from measured(setting, f"{name}/{title}", make, of="us")


Draw = Callable[[Tensor], Tensor]


def _drawn(kind: Kind, logits: Sequence[Tensor], draw: Draw) -> Peer:
    def error() -> float:
        """The share of tokens that could not have been drawn."""
        rows = logits[:CHECKED_ROWS]
        wrong = sum(not _is_legal(kind, row[0], int(draw(row).flatten()[0])) for row in rows)
        return wrong / len(rows)

    return Peer([partial(draw, row) for row in logits], error)


def _is_legal(kind: Kind, row: Tensor, token: int) -> bool:
    """Whether top-k, then top-p of what is left, keep the token; at the edge one more is let pass."""
    if not kind.top_k:
        return 0 <= token < len(row)
    best = (row / kind.temperature).topk(kind.top_k)
    before = best.values.softmax(0).cumsum(0).roll(1)
    before[0] = 0
    kept = int((before < kind.top_p + 1e-3).sum())
    return token in best.indices[:kept].tolist()


def torch_draw(kind: Kind, row: Tensor) -> Tensor:
    """As it is written in eager torch."""
    if not kind.top_k:
        probabilities = (row / kind.temperature).softmax(-1)
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)
    values, tokens = (row / kind.temperature).sort(-1, descending=True)
    values[:, kind.top_k :] = -math.inf
    probabilities = values.softmax(-1)
    probabilities[probabilities.cumsum(-1) - probabilities >= kind.top_p] = 0
    best = (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1)
    return tokens.gather(1, best[:, None])


def flashinfer_draw(kind: Kind, row: Tensor) -> Tensor:
    """Its samplers, which take no temperature: it is applied here."""
    ops = flashinfer().sampling
    scaled = row / kind.temperature
    if not kind.top_k:
        drawn: Tensor = ops.sampling_from_logits(scaled, seed=1, offset=0)
        return drawn
    kept: Tensor = ops.top_k_top_p_sampling_from_logits(
        scaled, kind.top_k, kind.top_p, seed=1, offset=0
    )
    return kept


def parts() -> Mapping[str, Part]:
    """By name: torch's, then FlashInfer's, whose kernels may be built when they are first called."""
    compared = [shape for shape in DECODE if shape.name in COMPARED]
    found: dict[str, Part] = {}
    for kind in KINDS:
        found[f"sampling, {kind.name}"] = partial(sampling, kind=kind)
    for T in load_moe.ROWS:
        found[f"moe, {T} tokens"] = partial(moe, T=T)
    for shape in compared:
        found[f"decode, {shape.name}"] = partial(decode, shape=shape)
    for shape in PREFILL:
        found[f"prefill, {shape.name}"] = partial(prefill, shape=shape)
    for shape in compared:
        found[f"paged decode, {shape.name}"] = partial(paged_decode, shape=shape)
    for shape in PREFILL:
        found[f"FlashInfer's prefill, {shape.name}"] = partial(flashinfer_prefills, shape=shape)
    return found
