"""Steps that meet every kernel which serving can, before there is a request. Their numbers mean nothing; their sizes are all
that a kernel's choice may depend on.

On a GPU they load what was compiled, before the engine says that it is ready. On a launcher that compiles only, or lists,
they find out what there is: by construction what serving needs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from vivace.engine.adjustments import AdjustmentRows
from vivace.engine.batch import Batch, SamplingRows
from vivace.engine.config import Config
from vivace.engine.events import Sampling
from vivace.engine.models.program import Kind, Program, Sizes, Symbol, sized, values_of
from vivace.engine.models.spec import ModelSpec
from vivace.engine.plan import Machine, Plan, make_plan
from vivace.engine.request import Array, Request
from vivace.engine.runner import Runner
from vivace.engine.sampler import Sampler
from vivace.engine.sampling import MAX_LOGPROBS
from vivace.engine.scheduler import Step
from vivace.kernels.backend import Ops
from vivace.kernels.buffer import Buffer, DType

ENDLESS = Machine(num_cpus=1, free_bytes=1 << 62)  # where tensors have no memory
CHUNK = 64  # tokens of a prompt beside requests that decode
WEIGHTS = {DType.FP32: np.float32, DType.BF16: np.uint16}  # as checkpoints are read


@dataclass(frozen=True, slots=True)
class Bound:
    """What runs a plan's steps, and what draws from their logits."""

    plan: Plan
    runner: Runner
    sampler: Sampler


def warm_up(bound: Bound) -> None:
    """Run each step, then draw from many rows and from few. Writes to the first block of the cache."""
    most, block_tokens = bound.plan.most, bound.plan.block_tokens
    for query_lens in _steps(most, most[Symbol.X] * block_tokens):
        for columns in (-(-max(query_lens) // block_tokens), most[Symbol.X]):
            bound.runner.step(step_inputs(query_lens, columns, len(query_lens)))
    max_rows = min(most[Symbol.R], most[Symbol.P])
    logits, _ = bound.runner.step(step_inputs([1], 1, max_rows))
    for num_rows in ladder(max_rows):
        for num_logprobs in (0, *ladder(MAX_LOGPROBS)):
            draw(bound.sampler, logits, num_rows, num_logprobs)


def bind_dry(config: Config, spec: ModelSpec, program: Program, ops: Ops) -> Bound:
    """A model whose weights are arrays without numbers: for ops whose tensors have no memory, or that make numbers up."""
    plan = make_plan(config, spec, program, ENDLESS)
    weights = {
        value.name: np.broadcast_to(np.zeros((), WEIGHTS[value.dtype]), sized(value.shape, {}))
        for value in values_of(program)
        if value.kind is Kind.WEIGHT
    }
    num_blocks, block_tokens = plan.num_blocks, plan.block_tokens
    runner = Runner(
        program, ops, weights, most=plan.most, num_blocks=num_blocks, block_tokens=block_tokens
    )
    return Bound(plan, runner, Sampler(ops, plan.max_rows, spec.vocab_size))


def one_of_each(spec: ModelSpec) -> ModelSpec:
    """The model with one layer of each kind, and its last, which computes fewer rows: all that its kernels depend on."""
    return replace(spec, layers=(*dict.fromkeys(spec.layers), spec.layers[-1]))


def ladder(most: int) -> list[int]:
    """Sizes up to `most` that could matter to a kernel: one, powers of two and those just above, the most."""
    powers = [1 << i for i in range(most.bit_length())]
    sizes = {*powers, *(power + 1 for power in powers), most}
    return sorted(size for size in sizes if size <= most)


def _steps(most: Sizes, context: int) -> Iterator[Sequence[int]]:
    """Tokens of each request: all decode, some compute prompts, or one does while the others decode; last, all that can run
    share the tokens of the largest step, which takes the most scratch."""
    for num_requests in ladder(most[Symbol.B]):
        yield [1] * num_requests
        num_left = min(most[Symbol.T] - num_requests + 1, context, CHUNK)
        yield [*[1] * (num_requests - 1), num_left]
    for num_tokens in ladder(min(most[Symbol.T], most[Symbol.B] * context)):
        whole, rest = divmod(num_tokens, context)
        yield [context] * whole + [rest] * (rest > 0)
    each, rest = divmod(min(most[Symbol.T], most[Symbol.B] * context), most[Symbol.B])
    yield [each + 1] * rest + [each] * (most[Symbol.B] - rest)


def step_inputs(query_lens: Sequence[int], columns: int, num_rows: int) -> dict[str, Array]:
    """Of requests that compute so many tokens, all that they have; each of their blocks is the cache's first."""
    num_requests, num_tokens = len(query_lens), sum(query_lens)
    lens_B = np.array(query_lens, np.int32)
    starts = np.concatenate((np.zeros(1, np.int32), np.cumsum(lens_B, dtype=np.int32)))
    nothing_T = np.zeros(num_tokens, np.int32)
    return {
        "tokens": nothing_T,
        "positions": nothing_T,
        "rope_variants": nothing_T,  # read by LongRoPE alone
        "slots": nothing_T,
        "block_tables": np.zeros((num_requests, columns), np.int32),
        "query_starts": starts,
        "context_lens": lens_B,
        "rows": np.zeros(num_rows, np.int32),
        "meta_units": np.zeros(1, np.int32),
        "sparse_budgets": np.zeros(num_requests, np.int32),
        "sparse_dense_layers": np.zeros(num_requests, np.int32),
        "sparse_measured": np.zeros(num_requests, np.int32),
    }


def draw(sampler: Sampler, logits: Buffer, num_rows: int, num_logprobs: int) -> None:
    """Sample from the first rows, with one penalty and one bias in all, and ask for logprobs."""
    batch = _batch(num_rows, num_logprobs)
    sampler.sample(logits, batch)
    sampler.logprobs(logits, batch, [0] * num_rows)


def _batch(num_rows: int, num_logprobs: int) -> Batch:
    zeros, ones = np.zeros(num_rows, np.float32), np.ones(num_rows, np.float32)
    none = np.zeros(num_rows, np.int32)
    starts = np.minimum(np.arange(num_rows + 1, dtype=np.int32), 1)
    one = np.zeros(1, np.int32)
    adjustments = AdjustmentRows(
        ones, zeros, zeros, starts, one, one, starts, one, np.zeros(1, np.float32)
    )
    greedy = Sampling(0.0, 0, 1.0, 0.0, 0, 1, 0, (), None, None)
    nobody = Request(id="", tokens=[0], num_prompt_tokens=1, sampling=greedy, arrival=0.0)
    return Batch(
        step=Step((), ()),
        inputs={},
        sampled=[nobody] * num_rows,
        prompt_rows=(),
        pooled_rows=(),
        num_rows=num_rows + 1,  # so that those that want logprobs are picked
        sampling=SamplingRows(
            ones, none, ones, zeros, none.astype(np.int64), none, adjustments=adjustments
        ),
        logprob_rows=np.arange(num_rows, dtype=np.int32),
        num_logprobs=num_logprobs,
    )
