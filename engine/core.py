"""The native engine: schedule, run, sample, commit. One `step` is one forward pass.

Synchronous, deterministic, free of I/O. Time comes in as an argument; the clock is read only to report how long a
request took, never to decide anything.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vivace.engine import pooling
from vivace.engine.batch import Batch, Batcher
from vivace.engine.blocks import BlockPool
from vivace.engine.config import Config, check_backend
from vivace.engine.errors import ConfigError, InvalidRequest
from vivace.engine.events import (
    EngineInfo,
    EngineRequest,
    FinishReason,
    Loads,
    TokenEvent,
    TokenLogprobs,
    Usage,
)
from vivace.engine.models import packing, weights
from vivace.engine.models.generation_config import read_generation_defaults
from vivace.engine.models.hf_config import read_spec
from vivace.engine.models.program import Program
from vivace.engine.models.quantize import Quantize, place
from vivace.engine.plan import (
    Plan,
    make_plan,
    num_parameters,
    program_of,
    read_machine,
    weight_dtype,
)
from vivace.engine.prefix import PrefixIndex
from vivace.engine.request import Request
from vivace.engine.runner import Runner
from vivace.engine.sampler import RowLogprobs, Sampler
from vivace.engine.scheduler import ContextRules, Scheduler
from vivace.engine.sparse import SparseDecode
from vivace.engine.warm_up import Bound, warm_up
from vivace.kernels import backend

Clock = Callable[[], float]
SALT_KEY_BYTES = 32


@dataclass(slots=True)
class _Counters:
    """Totals since the start; the engine loop alone writes them."""

    num_steps: int = 0
    num_tokens_computed: int = 0
    num_tokens_generated: int = 0
    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_requests_finished: int = 0
    num_requests_aborted: int = 0
    cancel_to_free_s: float = 0.0  # a maximum


class EngineCore:
    """Owned by one thread. `progress` alone may be called from another."""

    def __init__(
        self,
        config: Config,
        plan: Plan,
        bound: Bound,
        *,
        context: ContextRules,
        info: EngineInfo,
        clock: Clock,
    ) -> None:
        self.info = info
        block_tokens = plan.block_tokens
        self._prefix = PrefixIndex(
            block_tokens, os.urandom(SALT_KEY_BYTES), verify_hits=config.cache.verify_hits
        )
        self._pool = BlockPool(plan.num_blocks, self._prefix)
        self._scheduler = Scheduler(
            config.scheduler,
            self._pool,
            self._prefix,
            block_tokens=block_tokens,
            prefix_sharing=config.cache.prefix_sharing,
            context=context,
        )
        self._batcher = Batcher(
            config.scheduler.max_running,
            plan.max_blocks,
            block_tokens,
            vocab_size=info.vocab_size,
            long_rope_from=context.long_rope_from,
        )
        self._sparse = SparseDecode(
            config.sparse,
            self._pool,
            plan.sparse,
            block_tokens=block_tokens,
            max_running=config.scheduler.max_running,
        )
        self._runner, self._sampler = bound.runner, bound.sampler
        self._first_counted = bound.runner.counted()  # by warming up
        self._clock = clock
        self._aborted: list[tuple[str, float]] = []  # and when; the next step drops them
        self._counters = _Counters()
        self.progress = bound.runner.ops.progress  # a count of finished ops

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._aborted or self._scheduler.num_running or self._scheduler.num_waiting)

    def add(self, request: EngineRequest, now: float) -> None:
        """Queue a request. Raises Overloaded or InvalidRequest."""
        if request.pooling is not None and request.sampling.max_tokens > 0:
            raise InvalidRequest(
                f"max_tokens must be 0 with pooling, got {request.sampling.max_tokens}"
            )
        most = len(request.prompt_token_ids) + request.sampling.max_tokens
        if most > self.info.max_context_tokens:
            raise InvalidRequest(
                f"prompt and max_tokens must fit the context of {self.info.max_context_tokens} "
                f"tokens, got {most}"
            )
        queued = Request(
            id=request.request_id,
            tokens=list(request.prompt_token_ids),
            num_prompt_tokens=len(request.prompt_token_ids),
            sampling=request.sampling,
            arrival=now,
            deadline=request.deadline,
            salt=request.salt,
            priority=request.priority,
            pooling=request.pooling,
            prompt_logprobs=_unwanted_logprobs(request),
        )
        self._scheduler.add(queued)
        self._sparse.num_live += queued.sparse is not None

    def abort(self, request_id: str, now: float) -> bool:
        """End a request early; the next step frees its blocks and gives its last event. False if it is not here."""
        if request_id not in self._scheduler:
            return False
        self._aborted.append((request_id, now))
        return True

    def step(self, now: float) -> list[TokenEvent]:
        """One forward pass over whatever should run now. Every event of it, in no order between requests."""
        events = self._drop_ended(now)
        step = self._scheduler.step(now)
        if not (step.decoding or step.chunks):
            return events
        batch = self._batcher.build(step)
        sample = partial(self._sampler.sample, batch=batch) if batch.num_sampled else None
        inputs = batch.inputs | self._sparse.inputs(step)
        logits_RV, hidden_PM = self._runner.step(inputs, batch.num_rows, sample)
        sampled = self._sampler.sampled(batch) if batch.num_sampled else []
        if self._sparse.measured:
            mass_B2 = self._runner.kept_mass(len(inputs["context_lens"]))
            self._sparse.judge(self._runner.ops.memory.read(mass_B2))
        logprobs = self._sampler.logprobs(logits_RV, batch, sampled)
        if batch.pooled_rows:
            pooling.add_rows(batch.pooled_rows, self._runner.ops.memory.read(hidden_PM))
        return events + self._commit(batch, sampled, logprobs)

    def loads(self) -> Loads:
        """How busy the engine is."""
        counters = self._counters
        return Loads(
            num_running=self._scheduler.num_running,
            num_waiting=self._scheduler.num_waiting,
            num_blocks=self._pool.num_blocks,
            num_blocks_used=self._pool.num_blocks - self._pool.num_available,
            num_blocks_cached=self._pool.num_cached,
            num_steps=counters.num_steps,
            num_tokens_computed=counters.num_tokens_computed,
            num_tokens_generated=counters.num_tokens_generated,
            num_prompt_tokens=counters.num_prompt_tokens,
            num_cached_tokens=counters.num_cached_tokens,
            num_preemptions=counters.num_preemptions,
            num_requests_finished=counters.num_requests_finished,
            num_requests_aborted=counters.num_requests_aborted,
            num_compiled_after_ready=self._num_compiled(),
            cancel_to_free_s=counters.cancel_to_free_s,
            num_sparse_tokens=self._sparse.num_tokens,
            num_measured_rows=self._sparse.num_measured,
            kept_mass_sum=self._sparse.kept_mass_sum,
            num_returned_to_dense=self._sparse.num_returned,
            expert_loads=tuple(
                tuple((counted - first).tolist())
                for counted, first in zip(self._runner.counted(), self._first_counted, strict=True)
            ),
        )

    def _num_compiled(self) -> int:
        compilation = self._runner.ops.compilation
        return 0 if compilation is None else compilation.num_compiled_after_ready

    def _drop_ended(self, now: float) -> list[TokenEvent]:
        counters, events = self._counters, []
        aborted, self._aborted = self._aborted, []
        for request_id, since in aborted:
            if request_id in self._scheduler:  # else: aborted twice
                events.append(self._drop(request_id, FinishReason.ABORT, now))
                counters.cancel_to_free_s = max(counters.cancel_to_free_s, now - since)
        for request_id in self._scheduler.expired(now):
            events.append(self._drop(request_id, FinishReason.DEADLINE, now))
        return events

    def _drop(self, request_id: str, reason: FinishReason, now: float) -> TokenEvent:
        request = self._scheduler.end(request_id)
        assert request is not None
        self._counters.num_requests_aborted += 1
        self._count(request)
        return TokenEvent(request_id, finish=reason, usage=_usage(request, now))

    def _commit(
        self, batch: Batch, sampled: list[int], logprobs: RowLogprobs | None
    ) -> list[TokenEvent]:
        then = self._clock()
        if logprobs is not None:
            _record_prompt_logprobs(batch, logprobs)
        finished = self._scheduler.commit(batch.step, sampled)
        for request in finished:
            self._counters.num_requests_finished += 1
            self._count(request)
        events = []
        row = -1  # of logprobs: those that want any have one, in their order
        for request, token in zip(batch.sampled, sampled, strict=True):
            if logprobs is None and request.first_token is not None and request not in finished:
                event = TokenEvent(request.id, (token,))  # as nearly all are
            else:
                count = request.sampling.logprobs
                row += count is not None
                event = _token_event(
                    request,
                    token,
                    finished.get(request),
                    then=then,
                    logprobs=()
                    if logprobs is None or count is None
                    else (logprobs.row(row, count),),
                )
            events.append(event)
        events += (
            _prompt_event(request, finish, then)
            for request, finish in finished.items()
            if request.sampling.max_tokens == 0
        )
        self._counters.num_steps += 1
        self._counters.num_tokens_computed += len(batch.inputs["tokens"])
        self._counters.num_tokens_generated += len(sampled)
        return events

    def _count(self, request: Request) -> None:
        self._counters.num_prompt_tokens += request.num_prompt_tokens
        self._counters.num_cached_tokens += request.num_cached_tokens
        self._counters.num_preemptions += request.num_preemptions
        self._sparse.num_live -= request.sparse is not None


def _token_event(
    request: Request,
    token: int,
    finish: FinishReason | None,
    *,
    then: float,
    logprobs: tuple[TokenLogprobs, ...],
) -> TokenEvent:
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()
    if request.first_token is None:
        request.first_token = then
        prompt_logprobs = tuple(request.prompt_logprobs)
        # Their number is what is needed from now on; they themselves are large.
        request.prompt_logprobs = [None] * len(prompt_logprobs)
    return TokenEvent(
        request.id,
        token_ids=(token,),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        finish=finish,
        stop_token_id=token if finish is FinishReason.STOP else None,
        usage=None if finish is None else _usage(request, then),
    )


def _prompt_event(request: Request, finish: FinishReason, then: float) -> TokenEvent:
    """The one event of a request that draws nothing."""
    return TokenEvent(
        request.id,
        prompt_logprobs=tuple(request.prompt_logprobs),
        finish=finish,
        usage=_usage(request, then),
        embedding=pooling.embedding(request),
    )


def _unwanted_logprobs(request: EngineRequest) -> list[TokenLogprobs | None]:
    """One None for each prompt token before the first whose logprobs are wanted; nothing predicts the very first."""
    sampling = request.sampling
    if sampling.prompt_logprobs is None:
        return []
    return [None] * min(sampling.prompt_logprobs_start, len(request.prompt_token_ids))


def _usage(request: Request, then: float) -> Usage:
    scheduled = then if request.first_scheduled is None else request.first_scheduled
    first_token = request.arrival if request.first_token is None else request.first_token
    usage = Usage(
        prompt_tokens=request.num_prompt_tokens,
        cached_tokens=request.num_cached_tokens,
        completion_tokens=request.num_generated,
        queue_s=scheduled - request.arrival,
        first_token_s=first_token - request.arrival,
        total_s=then - request.arrival,
        num_preemptions=request.num_preemptions,
    )
    if (state := request.sparse) is None:
        return usage
    count = state.num_measured
    return replace(
        usage,
        sparse_tokens=state.num_tokens,
        kept_mass=state.kept_mass_sum / count if count else None,
        num_measured=count,
        returned_to_dense=state.is_returned,
    )


def _record_prompt_logprobs(batch: Batch, logprobs: RowLogprobs) -> None:
    row = len(batch.logprob_rows) - sum(rows.count for rows in batch.prompt_rows)
    for rows in batch.prompt_rows:
        request = rows.request
        assert len(request.prompt_logprobs) == rows.first_position
        count = request.sampling.prompt_logprobs or 0
        request.prompt_logprobs += (logprobs.row(row + i, count) for i in range(rows.count))
        row += rows.count


def load(
    config: Config,
    progress: Callable[[int, int], None],
    adapt: Callable[[backend.Ops], backend.Ops] = lambda ops: ops,
) -> EngineCore:
    """Read a checkpoint and make it ready to step. `progress` gets bytes read and bytes in all.
    `adapt` changes the ops before anything is bound to them; a benchmark does.

    Raises ConfigError or ArtifactError, both before anything large is allocated where that can be known.
    """
    start = time.monotonic()
    check_backend(config)
    spec = read_spec(config.model)
    program = program_of(config, spec)
    plan = make_plan(config, spec, program, read_machine(config.device))
    ops = adapt(_load_ops(config, plan))
    loading = packing.Work(plan.threads, config.weights.cache_dir, progress)
    arrays, origin = _load_weights(config, program, spec.architecture, ops.memory, work=loading)
    runner = Runner(
        program,
        ops,
        arrays,
        most=plan.most,
        num_blocks=plan.num_blocks,
        block_tokens=plan.block_tokens,
    )
    sampler = Sampler(ops, plan.max_rows, spec.vocab_size)
    bound = Bound(plan, runner, sampler)
    if ops.compilation is not None and config.device != "cpu":  # else: interpreted, for tests
        warm_up(bound)
        ops.compilation.seal(config.gpu.strict_jit)
    info = EngineInfo(
        architecture=spec.architecture,
        vocab_size=spec.vocab_size,
        max_context_tokens=plan.max_context_tokens,
        eos_token_ids=read_generation_defaults(config.model).eos_token_ids,
        num_parameters=num_parameters(program),
        weights=f"{plan.weight_kinds}; {origin}",
        dtype=weight_dtype(config, program),
        backend=config.runs_on.value,
        device=config.device,
        threads=plan.threads,
        block_tokens=plan.block_tokens,
        num_blocks=plan.num_blocks,
        kv_dtype=plan.kv_dtype.value,
        kv_bytes=plan.kv_bytes,
        max_running=config.scheduler.max_running,
        max_waiting=config.scheduler.max_waiting,
        load_s=time.monotonic() - start,
        isa=ops.isa,
        sparse=plan.sparse,
    )
    context = ContextRules(window=spec.window, long_rope_from=spec.long_rope_from)
    return EngineCore(config, plan, bound, context=context, info=info, clock=time.monotonic)


def _load_ops(config: Config, plan: Plan) -> backend.Ops:
    if config.runs_on is backend.Backend.CPU:
        try:
            return backend.load(config.runs_on, threads=plan.threads, isa=config.cpu.isa)
        except ValueError as error:  # the library alone knows what the CPU has
            raise ConfigError(f"cpu.{error}") from error
    folder = config.gpu.kernel_cache_dir
    try:
        return backend.load(config.runs_on, device=config.device, cache_dir=folder)
    except (ImportError, ValueError) as error:  # torch alone knows what devices there are
        raise ConfigError(str(error)) from error


def _load_weights(
    config: Config, program: Program, architecture: str, memory: Any, *, work: packing.Work
) -> tuple[dict[str, Any], str]:
    """The weights by name, and where they come from."""
    is_quantized = config.weights.quantize is not Quantize.NONE
    if is_quantized and config.runs_on is backend.Backend.CPU:
        return packing.load(config.model, program, architecture, memory=memory, work=work)
    arrays = weights.load(
        config.model, program, architecture, work.progress, place=partial(place, memory)
    )
    return arrays, "of the checkpoint"
