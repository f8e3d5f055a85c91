"""What other ops on a device must do to the last bit: a row depends on itself alone, a graph on its buffers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch

from tests.gpu.anchor_attention import bits, product_bits
from tests.gpu.load_moe import Experts, Layer, experts, layer
from tests.gpu.load_sampling import Kind, Sampling, sampling_of
from tests.gpu.results import Result
from tests.gpu.setting import TOLERANCE_BF16, Part, Setting, relative
from tests.gpu.timing import Replay
from vivace.kernels.backend import Ops
from vivace.kernels.moe_assign import tile_rows

Tensor = torch.Tensor
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
SUBSETS = (
    (0,),
    (3, 4, 5),
    tuple(range(17)),
    tuple(range(60, 130)),
)  # the last on a GPU, in wide tiles as all rows are
Rows = Callable[[Ops, Tensor], Tensor]  # an op as a function of its rows


def projection(setting: Setting, dtype: torch.dtype) -> Iterator[Result]:
    """`linear`, from one row to many."""
    N, K = (48, 40) if setting.is_tiny else (768, 512)
    weight = torch.randn(N, K, device=setting.device).to(dtype)

    def run(ops: Ops, x: Tensor) -> Tensor:
        out = torch.full((len(x), N), torch.nan, device=x.device)
        ops.linear(out, x, weight)
        return out

    yield from _alone(setting, f"linear, {NAMES[dtype]}", run, K)


def norm(setting: Setting, dtype: torch.dtype) -> Iterator[Result]:
    """`rmsnorm`."""
    weight = torch.randn(40, device=setting.device)

    def run(ops: Ops, x: Tensor) -> Tensor:
        out = torch.full_like(x, torch.nan)
        ops.rmsnorm(out, x, weight, eps=1e-6)
        return out

    yield from _alone(setting, "rmsnorm", run, 40)


def _alone(setting: Setting, name: str, run: Rows, width: int) -> Iterator[Result]:
    T = 130 if setting.is_gpu else 20
    x = torch.randn(T, width, device=setting.device)
    ops = setting.ops()
    whole = run(ops, x).clone()
    for rows in (rows for rows in (*SUBSETS, (T - 1,)) if rows[-1] < T):
        got = run(ops, x[list(rows)].contiguous())
        title = f"anchors/{name}: rows {rows[0]}-{rows[-1]} of {T}"
        yield product_bits(setting, title, whole[list(rows)], got)


def expert_layer(setting: Setting, dtype: torch.dtype) -> Iterator[Result]:
    """A whole layer: right, and a token's row the same with any others, whatever path the size takes."""
    made = experts(setting.device, dtype, is_tiny=True)
    ops, name = setting.ops(), f"anchors/moe layer, {NAMES[dtype]}"
    for T in (1, 3, 40, 300) if setting.is_gpu else (1, 9):
        whole = _random_layer(made, T)
        whole.run(ops)
        specified = layer(made, whole.x_TM, whole.logits_TE)
        specified.run(setting.reference())
        error = relative(whole.out_TM, specified.out_TM)
        tolerance = 1e-5 if dtype == torch.float32 else TOLERANCE_BF16
        yield Result(f"{name}: {T} tokens", error <= tolerance, error)
        yield _assignment(f"{name}: assignment of {T}", whole, specified)
        again = layer(made, whole.x_TM, whole.logits_TE)
        again.run(ops)
        yield bits(f"{name}: {T} tokens twice", whole.out_TM, again.out_TM)
        for t in {0, T // 2, T - 1}:
            one = layer(made, *(x[t : t + 1].contiguous() for x in (whole.x_TM, whole.logits_TE)))
            one.run(ops)
            title = f"{name}: token {t} of {T} alone"
            yield product_bits(setting, title, whole.out_TM[t : t + 1], one.out_TM)
    yield from _crowded(setting, name, made, ops)


def _crowded(setting: Setting, name: str, made: Experts, ops: Ops) -> Iterator[Result]:
    """All tokens to the same experts, the others empty."""
    crowd = _random_layer(made, 33)
    crowd.logits_TE[:, :2] += 50
    crowd.run(ops)
    specified = layer(made, crowd.x_TM, crowd.logits_TE)
    specified.run(setting.reference())
    error = relative(crowd.out_TM, specified.out_TM)
    yield Result(f"{name}: all to two experts", error <= TOLERANCE_BF16, error)


def _random_layer(made: Experts, T: int) -> Layer:
    E, M, _ = made.down.shape
    make = partial(torch.randn, device=made.down.device)
    return layer(made, make(T, M), make(T, E))


def _assignment(name: str, got: Layer, want: Layer) -> Result:
    """Exactly the reference's, where anything is to be sorted."""
    E = len(got.experts.down)
    if tile_rows(got.order_TK.numel(), E) == 1:
        return Result(name, torch.equal(got.experts_TK, want.experts_TK))
    names = "experts_TK", "order_TK", "tiles_TK3"
    return Result(name, all(torch.equal(getattr(got, n), getattr(want, n)) for n in names))


def _kinds() -> Sequence[Kind]:
    return Kind("all", temperature=1.0), Kind("some", top_k=20, top_p=0.9), Kind("", temperature=0)


def sampled_rows(setting: Setting, dtype: torch.dtype) -> Iterator[Result]:
    """A row drawn in a batch and alone."""
    V = 4096 if setting.is_gpu else 260
    ops, logits = setting.ops(), 3 * torch.randn(5, V, device=setting.device)
    for kind in _kinds():
        whole = sampling_of(kind, logits, torch.full_like(logits, torch.nan), 7)
        whole.run(ops)
        rows = [
            sampling_of(kind, row[None].clone(), torch.empty_like(row[None]), 7 + r)
            for r, row in enumerate(logits)
        ]
        for one in rows:
            one.run(ops)
        same = torch.equal(whole.tokens_R, torch.cat([one.tokens_R for one in rows]))
        scores = torch.cat([one.scores_RV for one in rows])
        same = same and torch.equal(whole.scores_RV, scores)
        yield Result(f"anchors/sample, {kind}: a row in a batch = alone", same)


def graphs(setting: Setting, dtype: torch.dtype) -> Iterator[Result]:
    """Captured once, other contents of the same buffers: what a plain call gives."""
    made = experts(setting.device, dtype, is_tiny=True)
    ops, one = setting.ops(), _random_layer(made, 9)
    replay = Replay(partial(one.run, ops), setting.device)
    for i in range(2):
        one.logits_TE.copy_(torch.randn_like(one.logits_TE) * (1 + 20 * i))
        one.x_TM.copy_(torch.randn_like(one.x_TM))
        one.out_TM.fill_(torch.nan)
        replay()
        plain = layer(made, one.x_TM, one.logits_TE)
        plain.run(setting.ops())
        name = f"anchors/moe layer, {NAMES[dtype]}, in a graph, replay {i}"
        yield bits(name, one.out_TM, plain.out_TM)


def sampling_graph(setting: Setting, dtype: torch.dtype) -> Iterator[Result]:
    V = 4096 if setting.is_gpu else 260
    logits = torch.randn(3, V, device=setting.device)
    ops = setting.ops()
    one = sampling_of(_kinds()[1], logits, torch.empty_like(logits), 0)
    replay = Replay(partial(one.run, ops), setting.device)
    for i in range(2):
        logits.copy_(3 * torch.randn_like(logits))
        one.rest[4].add_(11)  # seeds
        one.rest[5].add_(1)  # positions
        one.rest[1].fill_((40, 0)[i])  # top_k
        replay()
        plain: Sampling = replace(one, tokens_R=torch.full_like(one.tokens_R, -1))
        replayed = one.tokens_R.clone()
        plain.run(setting.ops())
        yield Result(
            f"anchors/sample in a graph, replay {i}", torch.equal(replayed, plain.tokens_R)
        )


def parts() -> Mapping[str, Part]:
    """By name."""
    found: dict[str, Part] = {}
    for name, dtype in DTYPES.items():
        for part in (projection, expert_layer, graphs):
            found[f"{part.__name__}, {name}"] = partial(part, dtype=dtype)
    for part in (norm, sampled_rows, sampling_graph):
        found[part.__name__] = partial(part, dtype=torch.float32)
    return found
