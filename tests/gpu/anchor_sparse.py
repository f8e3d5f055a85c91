"""What selecting blocks on a device must do: the reference's choice exactly, and nothing to whoever is not sparse."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch

from tests.gpu.anchor_attention import bits
from tests.gpu.load_attention import Shape, Sparse, by_token, sparse_step
from tests.gpu.results import Result
from tests.gpu.setting import Part, Setting, relative
from tests.gpu.timing import Replay
from vivace.kernels.backend import Ops
from vivace.kernels.buffer import DType
from vivace.kernels.selection import UNIT_TOKENS

Tensor = torch.Tensor
BUDGET = 9 * UNIT_TOKENS
SCORE_TOLERANCE = 1e-4


def _shape(setting: Setting) -> Shape:
    if setting.is_tiny:
        return Shape("", 2, 200, H=4, G=2, D=16, S=16)
    return Shape("", 3, 1000, H=8, G=2, D=128, S=64)


def _made(setting: Setting, ops: Ops) -> Sparse:
    """Requests of other lengths, the last under the budget: dense."""
    one = sparse_step(ops, _shape(setting), setting.device, BUDGET)
    lens = one.step.lens_B
    lens -= 7 * torch.arange(len(lens), device=lens.device, dtype=torch.int32)
    lens[-1] = BUDGET - 5
    for x in (one.scores_BGXZ, one.step.out_THD):
        x.fill_(torch.nan)
    one.selected_BGXZ.fill_(2**30)  # faults where it is read and was not written
    return one


def as_specified(setting: Setting) -> Iterator[Result]:
    """Metadata, scores and choice beside the reference's, each from the same inputs."""
    ops, reference = setting.ops(), setting.reference()
    one = _made(setting, ops)
    step, shape = one.step, one.step.shape
    cache = reference.memory.kv_cache(len(step.cache), shape.S, shape.G, shape.D, DType.BF16)
    by_token(cache, shape.S).copy_(by_token(step.cache, shape.S))
    same = replace(
        one,
        step=replace(step, cache=cache, out_THD=torch.empty_like(step.out_THD)),
        meta=torch.empty_like(one.meta),
        scores_BGXZ=torch.full_like(one.scores_BGXZ, torch.nan),
        selected_BGXZ=one.selected_BGXZ.clone(),
        num_selected_BG=torch.empty_like(one.num_selected_BG),
    )
    units = torch.arange(len(one.meta), dtype=torch.int32, device=setting.device)
    reference.block_meta_update(same.meta, cache, units, block_tokens=shape.S)
    error = relative(one.meta.float(), same.meta.float())
    yield Result("anchors/sparse: metadata", error <= 1e-2, error)
    same = replace(same, meta=one.meta)
    one.choose(ops)
    same.choose(reference)
    sparse = slice(0, shape.batch - 1)
    error = relative(one.scores_BGXZ[sparse], same.scores_BGXZ[sparse])
    yield Result("anchors/sparse: scores", error <= SCORE_TOLERANCE, error)
    yield from _choices(one, ops, reference)
    one.run(ops)
    same.run(reference)
    error = relative(one.step.out_THD[-1], same.step.out_THD[-1])
    yield Result("anchors/sparse: who has few tokens is dense", error <= 1e-2, error)


def _choices(one: Sparse, ops: Ops, reference: Ops) -> Iterator[Result]:
    """Top-k of scores with ties, infinities and NaN."""
    scores = one.scores_BGXZ
    kinds = {
        "as scored": scores.clone(),
        "all equal": torch.zeros_like(scores),
        "many ties": torch.randint_like(scores, 0, 3),
        "infinite": torch.where(torch.rand_like(scores) < 0.5, torch.inf, -torch.inf),
        "NaN among them": torch.where(torch.rand_like(scores) < 0.5, torch.nan, scores),
    }
    who = one.step.lens_B, one.budgets_B, one.dense_layers_B
    for name, given in kinds.items():
        found = []
        for backend in (ops, reference):
            selected, count = (
                torch.full_like(x, -7) for x in (one.selected_BGXZ, one.num_selected_BG)
            )
            backend.block_topk(selected, count, given, *who, layer=0, block_tokens=one.step.shape.S)
            place = torch.arange(selected[0, 0].numel(), device=selected.device)
            is_given = place < count[..., None]
            found.append((torch.where(is_given, selected.flatten(2), -1), count))
        is_same = all(map(torch.equal, *found))
        yield Result(f"anchors/sparse: choice, {name}", is_same)


def dense_to_the_bit(setting: Setting) -> Iterator[Result]:
    """All units selected, and budgets that everything fits: what attention without a selection gives."""
    ops = setting.ops()
    one = _made(setting, ops)
    one.step.run(ops)
    dense = one.step.out_THD.clone()
    units = torch.arange(one.selected_BGXZ[0, 0].numel(), device=setting.device).int()
    one.selected_BGXZ.copy_(units.view_as(one.selected_BGXZ[0, 0]).expand_as(one.selected_BGXZ))
    one.num_selected_BG.copy_(-(-one.step.lens_B // UNIT_TOKENS)[:, None])
    one.step.out_THD.fill_(torch.nan)
    one.step.run(ops, (one.selected_BGXZ, one.num_selected_BG))
    yield bits("anchors/sparse: everything selected = dense", dense, one.step.out_THD)
    one.budgets_B.fill_(2**20)
    one.step.out_THD.fill_(torch.nan)
    one.run(ops)
    yield bits("anchors/sparse: below the budget = dense", dense, one.step.out_THD)


def graph_and_twice(setting: Setting) -> Iterator[Result]:
    """The whole chain in a graph, lengths and budgets changed in place, twice."""
    ops = setting.ops()
    one = _made(setting, ops)
    replay = Replay(partial(one.run, ops), setting.device)
    lens = one.step.lens_B.clone()
    for i, (fewer, budget) in enumerate(((0, 9), (33, 8), (16, 0))):
        one.step.lens_B.copy_((lens - fewer).clamp(min=1))
        one.budgets_B.fill_(budget)
        one.step.q_THD.copy_(torch.randn_like(one.step.q_THD))
        one.step.out_THD.fill_(torch.nan)
        replay()
        replayed = one.step.out_THD.clone()
        one.step.out_THD.fill_(torch.nan)
        one.run(setting.ops())
        yield bits(f"anchors/sparse in a graph, replay {i}", replayed, one.step.out_THD)


def parts() -> Mapping[str, Part]:
    """By name."""
    return {f"sparse, {p.__name__}": p for p in (as_specified, dense_to_the_bit, graph_and_twice)}
