"""What sparse decode costs in quality: chats behind long prompts, decoded token by token, sparsely and densely.

Two ways. With the text's own tokens, whatever the model would have drawn: perplexity, the best token at each place, and the
share of attention that the selection keeps, of every token. And greedily: which tokens differ, also with the recall guard.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import exp, fsum
from pathlib import Path
from typing import Any

from vivace.bench.result import Figure, figure
from vivace.engine import core
from vivace.engine.config import Config, SparseConfig
from vivace.engine.conversation import ChatMessage, Conversation
from vivace.engine.core import EngineCore
from vivace.engine.errors import ConfigError
from vivace.engine.events import EngineRequest, Sampling, Sparse, Usage
from vivace.engine.tokenizer import Tokenizer

GUARD = 0.999  # a bound that hardly any selection meets
POSITIONS = 8  # which argument of `kernels.sample` says where each token will stand


@dataclass(frozen=True, slots=True)
class Load:
    """Prompts of `least` to `most` tokens, each with the `tokens` that follow it."""

    rows: int = 40
    least: int = 1500
    most: int = 1850
    tokens: int = 128
    budget: int = 512
    layers_dense: int = 2


@dataclass(frozen=True, slots=True)
class Row:
    """A text of token ids, cut in two."""

    prompt: tuple[int, ...]
    rest: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Forced:
    """What the model thinks of the tokens of a row's rest, but for the first, which no decode step predicts."""

    logprobs: list[float]
    best: list[int]
    kept: list[float]  # of each step, the share of attention


def read_rows(model: Path, chats: Path, load: Load) -> list[Row]:
    """Chats, lines of JSON with `turns` that have a `role` and `content`, one after another as the template writes them."""
    tokenizer = Tokenizer.load(model)
    rows: list[Row] = []
    messages: list[ChatMessage] = []
    for line in chats.read_text(encoding="utf-8").splitlines():
        turns = json.loads(line)["turns"]
        messages += (ChatMessage(turn["role"], turn["content"]) for turn in turns)
        text = tokenizer.render_chat(Conversation(messages, add_generation_prompt=False))
        ids = tokenizer.encode(text, add_special_tokens=False)
        length = load.least + len(rows) * (load.most - load.least) // max(1, load.rows - 1)
        if len(ids) >= length + load.tokens:
            rest = ids[length : length + load.tokens]
            rows.append(Row(tuple(ids[:length]), tuple(rest)))
            messages = []
        if len(rows) == load.rows:
            return rows
    raise ConfigError(f"{chats} must hold chats for {load.rows} prompts, got {len(rows)}")


class Forcing:
    """Engines on the CPU backend that draw what they are told."""

    def __init__(self) -> None:
        self._text: tuple[int, ...] = ()

    def engine(self, config: Config) -> EngineCore:
        """One of them."""
        sample: Any = self._sample
        return core.load(config, _no_progress, lambda ops: replace(ops, sample=sample))

    def run(self, engine: EngineCore, row: Row, sampling: Sampling) -> Forced:
        """Decode a row's rest."""
        self._text = row.prompt + row.rest
        found = Forced([], [], [])
        before = engine.loads()
        for event in _events(engine, row, replace(sampling, logprobs=1)):
            for place in event.logprobs:
                found.logprobs.append(place.logprob)
                found.best.append(place.top[0][0])
            after = engine.loads()
            if after.num_measured_rows > before.num_measured_rows:
                found.kept.append(after.kept_mass_sum - before.kept_mass_sum)
            before = after
        del found.logprobs[0], found.best[0]
        return found

    def _sample(self, *args: Any) -> None:
        args[0][:] = [self._text[position] for position in args[POSITIONS]]


def measure(model: Path, rows: Sequence[Row], load: Load) -> list[Figure]:
    """Perplexities, kept shares, and tokens that differ."""
    config = Config(model=model, sparse=SparseConfig(min_kept_mass=0, measure_every=1))
    dense = Sampling(0.0, 0, 1.0, 0.0, 0, load.tokens, 0, (), None, None)
    selecting = replace(dense, sparse=Sparse(load.budget, 0, load.layers_dense))
    forcing = Forcing()
    engine = forcing.engine(config)
    densely = [forcing.run(engine, row, dense) for row in rows]
    sparsely = [forcing.run(engine, row, selecting) for row in rows]
    engine = core.load(config, _no_progress)
    greedy, selected = (
        [_greedy(engine, row, sampling)[0] for row in rows] for sampling in (dense, selecting)
    )
    guard = replace(config, sparse=SparseConfig(min_kept_mass=GUARD))
    engine = core.load(guard, _no_progress)
    guarded = [_greedy(engine, row, selecting) for row in rows]
    usages = [usage for _, usage in guarded]
    least = [fsum(one.kept) / len(one.kept) for one in sparsely]
    kept = [share for one in sparsely for share in one.kept]
    return [
        figure("kept attention mass of a token", kept),
        figure("kept attention mass, mean of all tokens", [fsum(kept) / len(kept)]),
        figure("kept attention mass, least of all tokens", [min(kept)]),
        figure("kept attention mass, mean of a prompt", least),
        figure("dense, perplexity", [_perplexity(densely)]),
        figure("sparse, perplexity", [_perplexity(sparsely)]),
        figure(
            "sparse, above dense, %", [100 * (_perplexity(sparsely) / _perplexity(densely) - 1)]
        ),
        figure("given text: best tokens that differ, %", _differing(densely, sparsely)),
        *_difference("greedy", greedy, selected),
        *_difference(f"guard at {GUARD}", greedy, [tokens for tokens, _ in guarded]),
        figure(
            "guard: requests returned to dense, %", [_percent(u.returned_to_dense for u in usages)]
        ),
        figure("guard: sparse tokens before", [float(usage.sparse_tokens) for usage in usages]),
    ]


def _events(engine: EngineCore, row: Row, sampling: Sampling) -> Iterator[Any]:
    engine.add(EngineRequest("row", row.prompt, sampling), time.monotonic())
    while engine.has_work:
        yield from engine.step(time.monotonic())


def _greedy(engine: EngineCore, row: Row, sampling: Sampling) -> tuple[list[int], Usage]:
    tokens: list[int] = []
    for event in _events(engine, row, sampling):
        tokens += event.token_ids
    assert event.usage is not None
    return tokens, event.usage


def _perplexity(found: Sequence[Forced]) -> float:
    logprobs = [one for row in found for one in row.logprobs]
    return exp(-fsum(logprobs) / len(logprobs))


def _difference(
    name: str, dense: Sequence[list[int]], other: Sequence[list[int]]
) -> Iterator[Figure]:
    firsts = [
        next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
        for a, b in zip(dense, other, strict=True)
    ]
    pairs = list(zip(dense, other, strict=True))
    shares = [_percent(x != y for x, y in zip(a, b, strict=True)) for a, b in pairs]
    yield figure(f"{name}: tokens that differ from dense, %", [fsum(shares) / len(shares)])
    yield figure(f"{name}: replies equal to dense, %", [_percent(a == b for a, b in pairs)])
    yield figure(f"{name}: tokens before the first that differs", [float(i) for i in firsts])


def _differing(dense: Sequence[Forced], other: Sequence[Forced]) -> list[float]:
    pairs = [
        pair for a, b in zip(dense, other, strict=True) for pair in zip(a.best, b.best, strict=True)
    ]
    return [_percent(x != y for x, y in pairs)]


def _percent(claims: Any) -> float:
    found = [bool(claim) for claim in claims]
    return 100 * sum(found) / len(found)


def _no_progress(_done: int, _total: int) -> None:
    """The bench writes its figures alone."""
