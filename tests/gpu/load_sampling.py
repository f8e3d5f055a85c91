"""Sampling from one row of logits of a large vocabulary, each call from other logits."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch

from tests.gpu.bars import figure, judged
from tests.gpu.machine import l2_bytes
from tests.gpu.results import Result
from tests.gpu.setting import Setting, meter_of
from tests.gpu.timing import copies
from vivace.kernels.backend import Ops

Tensor = torch.Tensor
VOCABULARY = 151_936
CHECKED = 16  # rows compared with the reference


@dataclass(frozen=True)
class Kind:
    """How rows are sampled."""

    name: str
    top_k: int = 0
    top_p: float = 1.0
    temperature: float = 0.7


KINDS = (Kind("temperature"), Kind("top-k 50, top-p 0.9", top_k=50, top_p=0.9))


@dataclass(frozen=True)
class Sampling:
    """The buffers of one call."""

    logits_RV: Tensor
    tokens_R: Tensor
    scores_RV: Tensor
    rest: tuple[Tensor, ...]

    def run(self, ops: Ops) -> None:
        """The op."""
        ops.sample(self.tokens_R, self.scores_RV, self.logits_RV, *self.rest)


def sampling_of(kind: Kind, logits_RV: Tensor, scores_RV: Tensor, seed: int) -> Sampling:
    """Of rows without penalties or biases."""
    R, device = len(logits_RV), logits_RV.device

    def of(value: float, dtype: torch.dtype = torch.float32, count: int = R) -> Tensor:
        return torch.full((count,), value, dtype=dtype, device=device)

    ints = torch.int32
    rest = (
        of(kind.temperature),
        of(kind.top_k, ints),
        of(kind.top_p),
        of(0.0),
        torch.arange(R, device=device) + seed,
        of(100, ints),
        of(1.0),
        of(0.0),
        of(0.0),
        of(0, ints, R + 1),
        of(0, ints, 0),
        of(0, ints, 0),
        of(0, ints, R + 1),
        of(0, ints, 0),
        of(0.0, count=0),
    )
    return Sampling(logits_RV, of(-1, ints), scores_RV, rest)


def rows(setting: Setting) -> list[Tensor]:
    """Logits of single rows, together several times the L2."""
    V = 260 if setting.is_tiny else VOCABULARY
    count = max(CHECKED, copies(4 * V, l2_bytes(setting.device)))
    return [3 * torch.randn(1, V, device=setting.device) for _ in range(count)]


def sampling(setting: Setting, kind: Kind) -> Iterator[Result]:
    """One row at a time; the scores, which nobody reads here, all into one buffer."""
    ops, logits = setting.ops(), rows(setting)
    scores = torch.empty_like(logits[0])
    calls = [sampling_of(kind, row, scores, seed) for seed, row in enumerate(logits)]
    timing = meter_of(setting, ops).times({"": [partial(one.run, ops) for one in calls]})[""]
    wrong = 0
    specification = setting.reference()
    for one in calls[:CHECKED]:
        got = one.tokens_R.item()
        one.run(specification)
        wrong += got != one.tokens_R.item()
    found = figure(f"sampling/{kind.name}", timing, of="us")
    yield judged(found, setting.ceilings, error=wrong / CHECKED, tolerance=0.0)
