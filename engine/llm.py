"""`vivace.LLM`: the engine in this process, for scripts and tests. The server gives the same core its own process."""

import itertools
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vivace.engine import core
from vivace.engine.completion import Completion, TextEvent
from vivace.engine.config import Config, quantized_by
from vivace.engine.errors import ConfigError, InvalidRequest
from vivace.engine.events import EngineRequest, FinishReason, TokenEvent, TokenLogprobs, Usage
from vivace.engine.models.generation_config import read_generation_defaults
from vivace.engine.replies import best_replies, reply_requests
from vivace.engine.sampling import (
    ModelLimits,
    Replies,
    SamplingParams,
    check_prompt,
    resolve,
    resolve_replies,
)
from vivace.engine.tokenizer import Tokenizer

Prompt = str | Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class Logprob:
    """Of one token at one place."""

    logprob: float
    rank: int
    decoded_token: str


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """What was generated. `token_ids` ends with the stop token, where there was one; `text` does not show it."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    finish_reason: str  # `stop` or `length`
    stop_reason: int | str | None  # the stop token or stop string
    logprobs: tuple[dict[int, Logprob], ...] | None  # one dict a token, the chosen one always in it


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """One prompt's result."""

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    # One a prompt token, None for the first.
    prompt_logprobs: tuple[dict[int, Logprob] | None, ...] | None
    outputs: tuple[CompletionOutput, ...]
    usage: Usage  # `completion_tokens` of all outputs (not of what `best_of` dropped), the rest of the first


@dataclass(slots=True)
class _Job:
    """One reply on its way. `LLM.generate` alone writes to it."""

    request: EngineRequest
    completion: Completion
    events: list[TextEvent]


@dataclass(frozen=True, slots=True)
class _Asked:
    """One prompt, and the replies that are drawn for it."""

    prompt: str | None
    request: EngineRequest
    jobs: list[_Job]
    replies: Replies
    echo: str  # what stands before each reply


class LLM:
    """A loaded model. Not thread-safe.

    Raises ConfigError or ArtifactError if it cannot be loaded. `config` gives everything but the model.
    """

    def __init__(
        self, model: str | Path, quantize: str | None = None, *, config: Config | None = None
    ) -> None:
        directory = Path(model)
        self._config = config or Config(model=directory)
        if quantize is not None:
            kind = quantized_by(quantize).quantize
            weights = replace(self._config.weights, quantize=kind)
            self._config = replace(self._config, weights=weights)
        if self._config.model != directory:
            raise ConfigError(f"config.model ({self._config.model}) is not the model ({directory})")
        self.directory = directory
        self._core = core.load(self._config, _no_progress)
        self._tokenizer = Tokenizer.load(directory)
        self._limits = ModelLimits(
            vocab_size=self._core.info.vocab_size,
            max_context_tokens=self._core.info.max_context_tokens,
            defaults=read_generation_defaults(directory),
            sparse=self._core.info.sparse,
        )
        self._ids = itertools.count()

    @property
    def core(self) -> core.EngineCore:
        """The engine itself, for tests and benchmarks."""
        return self._core

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer."""
        return self._tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete any number of prompts; results in their order. A prompt is text or `{"prompt_token_ids": [...]}`.

        Raises InvalidRequest or Unimplemented before anything runs.
        """
        listed: Sequence[Prompt] = [prompts] if isinstance(prompts, str | Mapping) else prompts
        per_prompt = _per_prompt(params, len(listed))
        asked = [self._asked(prompt, one) for prompt, one in zip(listed, per_prompt, strict=True)]
        self._run([job for one in asked for job in one.jobs])
        return [self._output(one) for one in asked]

    def _asked(self, prompt: Prompt, params: SamplingParams) -> _Asked:
        if isinstance(prompt, str):
            text, ids = prompt, self._tokenizer.encode(prompt)
        else:
            text, ids = None, _prompt_ids(prompt)
        check_prompt(ids, self._limits)
        sampling, rules = resolve(params, self._limits, len(ids))
        replies = resolve_replies(params)
        request = EngineRequest(str(next(self._ids)), tuple(ids), sampling)
        jobs = [
            _Job(one, Completion(self._tokenizer, rules), [])
            for one in reply_requests(request, replies)
        ]
        echo = ""
        if rules.echo:
            skip = rules.skip_special_tokens
            echo = self._tokenizer.decode(ids, skip_special_tokens=skip) if text is None else text
        return _Asked(text, request, jobs, replies, echo)

    def _run(self, jobs: Sequence[_Job]) -> None:
        waiting = deque(jobs)
        running: dict[str, _Job] = {}
        most = self._config.scheduler.max_waiting
        try:
            while waiting or running:
                while waiting and len(running) < most:
                    job = waiting.popleft()
                    self._core.add(job.request, time.monotonic())
                    running[job.request.request_id] = job
                for event in self._core.step(time.monotonic()):
                    self._push(running, event)
        finally:  # a bug or Ctrl-C: what still runs must not hold its blocks
            for request_id in running:
                self._core.abort(request_id, time.monotonic())
            self._core.step(time.monotonic())

    def _push(self, running: dict[str, _Job], event: TokenEvent) -> None:
        job = running[event.request_id]
        before = job.completion.matched
        shown = job.completion.push(event)
        job.events.append(shown)
        if shown.finish is not None:
            del running[event.request_id]
        elif job.completion.matched is not None and before is None:
            self._core.abort(event.request_id, time.monotonic())

    def _output(self, asked: _Asked) -> RequestOutput:
        sampling = asked.request.sampling
        keeps_logprobs = sampling.logprobs is not None
        drawn = [job.events for job in asked.jobs]
        ends = best_replies(drawn, asked.replies.n, keeps_logprobs=keeps_logprobs)
        usage = ends[0].usage
        assert usage is not None
        return RequestOutput(
            request_id=asked.request.request_id,
            prompt=asked.prompt,
            prompt_token_ids=asked.request.prompt_token_ids,
            prompt_logprobs=None
            if sampling.prompt_logprobs is None
            else tuple(
                None if place is None else self._place(place) for place in ends[0].prompt_logprobs
            ),
            outputs=tuple(self._reply(end, asked) for end in ends),
            usage=replace(usage, completion_tokens=sum(len(end.token_ids) for end in ends)),
        )

    def _reply(self, end: TextEvent, asked: _Asked) -> CompletionOutput:
        assert end.finish in (FinishReason.STOP, FinishReason.LENGTH)
        return CompletionOutput(
            index=end.index,
            text=asked.echo + end.text,
            token_ids=end.token_ids,
            finish_reason=end.finish.value,
            stop_reason=end.stop,
            logprobs=None
            if asked.request.sampling.logprobs is None
            else tuple(map(self._place, end.logprobs)),
        )

    def _place(self, place: TokenLogprobs) -> dict[int, Logprob]:
        text = self._tokenizer.token_text
        found = {
            token: Logprob(logprob, rank, text(token))
            for rank, (token, logprob) in enumerate(place.top, 1)
        }
        found.setdefault(place.token_id, Logprob(place.logprob, place.rank, text(place.token_id)))
        return found


def _no_progress(_done: int, _total: int) -> None:
    """`LLM` writes nothing."""


def _per_prompt(
    params: SamplingParams | Sequence[SamplingParams] | None, count: int
) -> Sequence[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * count
    if len(params) != count:
        raise InvalidRequest(
            f"params must be one or one per prompt: {count} prompts, {len(params)} params"
        )
    return params


def _prompt_ids(prompt: Mapping[str, Sequence[int]]) -> list[int]:
    if set(prompt) != {"prompt_token_ids"}:
        raise InvalidRequest(
            f"a prompt is text or {{'prompt_token_ids': [...]}}, got keys {sorted(prompt)}"
        )
    return list(prompt["prompt_token_ids"])
