"""Runs a `Runner` by hand, without scheduler or cache: each request's blocks are picked at random.

Also the oracle: what transformers says about the same tokens.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from vivace.engine.models import weights
from vivace.engine.models.decoder import emit
from vivace.engine.models.hf_config import read_spec
from vivace.engine.models.program import Program, Symbol
from vivace.engine.runner import Runner
from vivace.kernels.backend import Ops

Array = np.ndarray[Any, Any]


@dataclass
class Request:
    """Tokens so far, how many are in the cache, and the blocks they lie in."""

    tokens: list[int]
    blocks: list[int]
    num_computed: int = 0

    @property
    def num_pending(self) -> int:
        """Tokens still to be computed."""
        return len(self.tokens) - self.num_computed


@dataclass
class Driver:
    """One model on one backend."""

    program: Program
    runner: Runner
    block_tokens: int
    long_rope_from: int | None = None  # tokens that a request has before all of it is rotated anew
    free: list[int] = field(default_factory=list)

    def add(self, tokens: Sequence[int], max_tokens: int) -> Request:
        """A request that may grow to `max_tokens`."""
        count = -(-max_tokens // self.block_tokens)
        blocks, self.free = self.free[:count], self.free[count:]
        assert len(blocks) == count
        return Request(list(tokens), blocks)

    def remove(self, request: Request) -> None:
        """Give the blocks back."""
        self.free += request.blocks

    def step(self, chunks: Sequence[tuple[Request, int]], rows: str = "all") -> Array:
        """Compute the next n tokens of each request; logits of all rows, or of each chunk's
        last."""
        S = self.block_tokens
        tokens: list[int] = []
        positions: list[int] = []
        slots: list[int] = []
        variants: list[int] = []
        starts = [0]
        for request, count in chunks:
            end = request.num_computed + count
            tokens += request.tokens[request.num_computed : end]
            span = range(request.num_computed, end)
            positions += span
            slots += [request.blocks[p // S] * S + p % S for p in span]
            variants += [self.is_long(len(request.tokens))] * count
            starts.append(len(tokens))
            request.num_computed = end
        columns = max(-(-request.num_computed // S) for request, _ in chunks)
        tables = [(request.blocks + [0] * columns)[:columns] for request, _ in chunks]
        wanted = range(len(tokens)) if rows == "all" else [start - 1 for start in starts[1:]]
        inputs = {
            "tokens": tokens,
            "positions": positions,
            "slots": slots,
            "block_tables": tables,
            "query_starts": starts,
            "context_lens": [request.num_computed for request, _ in chunks],
            "rows": list(wanted),
            "rope_variants": variants,
        }
        arrays = {name: np.array(values, np.int32) for name, values in inputs.items()}
        logits, _ = self.runner.step(arrays)
        return np.array(self.runner.ops.memory.read(logits))  # a copy: the next step writes over it

    def is_long(self, num_tokens: int) -> bool:
        """Whether a request of so many tokens takes the factors of long contexts."""
        return self.long_rope_from is not None and num_tokens > self.long_rope_from

    def prompt_logits(self, tokens: Sequence[int], chunk: int) -> Array:
        """Logits of every position, the prompt cut into chunks."""
        request = self.add(tokens, len(tokens))
        pieces = []
        while (left := len(tokens) - request.num_computed) > 0:
            pieces.append(self.step([(request, min(chunk, left))]))
        self.remove(request)
        return np.concatenate(pieces)

    def greedy(
        self, prompts: Sequence[Sequence[int]], steps: int, *, stop: frozenset[int] = frozenset()
    ) -> list[list[int]]:
        """Greedy tokens of prompts that run together; a stop token is a request's last."""
        requests = [self.add(prompt, len(prompt) + steps) for prompt in prompts]
        found: list[list[int]] = [[] for _ in prompts]
        running = list(range(len(prompts)))
        for _ in range(steps):
            for i in running:
                if self.is_long(len(requests[i].tokens)) != self.is_long(
                    len(requests[i].tokens) - 1
                ):
                    requests[i].num_computed = 0
            chunks = [(requests[i], requests[i].num_pending) for i in running]
            chosen = self.step(chunks, rows="last").argmax(axis=1).tolist()
            for i, token in zip(running, chosen, strict=True):
                found[i].append(token)
                requests[i].tokens.append(token)
            running = [i for i in running if found[i][-1] not in stop]
            if not running:
                break
        for request in requests:
            self.remove(request)
        return found


def make_driver(
    directory: Path,
    ops: Ops,
    *,
    block_tokens: int = 16,
    num_blocks: int = 256,
    max_tokens: int = 2048,
    rewrite: Callable[[Program], Program] = lambda program: program,
) -> Driver:
    """Load a checkpoint; blocks are handed out in a random order."""
    spec = read_spec(directory)
    program = rewrite(emit(spec))
    loaded = weights.load(directory, program, spec.architecture, lambda done, total: None)
    most = {
        Symbol.T: max_tokens,
        Symbol.B: 64,
        Symbol.B1: 65,
        Symbol.P: max_tokens,
        Symbol.R: max_tokens,
        Symbol.X: num_blocks,
    }
    runner = Runner(
        program, ops, loaded, most=most, num_blocks=num_blocks, block_tokens=block_tokens
    )
    order = np.random.default_rng(3).permutation(num_blocks).tolist()
    return Driver(program, runner, block_tokens, spec.long_rope_from, order)


@dataclass(frozen=True)
class Greedy:
    """Greedy tokens, and by how much each one's logprob leads the second best's."""

    tokens: list[int]
    margins: list[float]

    def first_close(self, least_margin: float) -> int:
        """The first step whose margin is below, or the number of steps."""
        close = (i for i, margin in enumerate(self.margins) if margin < least_margin)
        return next(close, len(self.tokens))


class Oracle:
    """The same checkpoint in transformers, fp32 on the CPU."""

    def __init__(self, directory: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        rope = self.model.config.rope_parameters
        is_longrope = rope.get("rope_type") == "longrope"
        self._long_rope_from = rope["original_max_position_embeddings"] if is_longrope else math.inf

    @torch.no_grad()
    def hidden(self, tokens: Sequence[int]) -> Array:
        """The final hidden state of every position."""
        out = self.model.base_model(torch.tensor([list(tokens)]))
        result: Array = out.last_hidden_state[0].numpy()
        return result

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> Array:
        """Logits of every position."""
        result: Array = self.model(torch.tensor([list(tokens)])).logits[0].numpy()
        return result

    @torch.no_grad()
    def greedy(self, prompts: Sequence[Sequence[int]], steps: int) -> list[Greedy]:
        """Greedy continuations of prompts of one length."""
        tokens = torch.tensor([list(prompt) for prompt in prompts])
        known = tokens
        cache = None
        chosen: list[Any] = []
        margins: list[Any] = []
        for _ in range(steps):
            out = self.model(tokens, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            best = out.logits[:, -1].topk(2)
            chosen.append(best.indices[:, 0])
            margins.append(best.values[:, 0] - best.values[:, 1])
            tokens = best.indices[:, :1]
            known = torch.cat((known, tokens), dim=1)
            if known.shape[1] == self._long_rope_from + 1:  # as transformers' `generate` does
                tokens, cache = known, None
        rows = zip(torch.stack(chosen, 1).tolist(), torch.stack(margins, 1).tolist(), strict=True)
        return [Greedy(row, leads) for row, leads in rows]


def worst_row(got: Array, want: Array) -> float:
    """The largest max|got - want| / max|want| of any row."""
    return float((np.abs(got - want).max(axis=1) / np.abs(want).max(axis=1)).max())


def agrees(got: Sequence[int], want: Greedy, least_margin: float) -> bool:
    """Whether the tokens are equal up to the first step that is too close to call."""
    end = want.first_close(least_margin)
    return list(got[:end]) == want.tokens[:end]
