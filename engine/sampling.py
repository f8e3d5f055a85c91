"""What a caller may ask of a generation, checked once at the door. Holds no state.

`SamplingParams` is what callers write, every field unset by default; `resolve` turns it into the engine's `Sampling`
and the text layer's `TextRules`, with the checkpoint's defaults filled in, or says which field is wrong.
"""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from vivace.engine.errors import InvalidRequest, Unimplemented
from vivace.engine.events import Sampling, Sparse, SparseLimits

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIASES = 1024
MAX_REPLIES = 64
MAX_SHOWN_CHARS = 80  # of a value, in what is said of it
LEAST_TOP_P = 1e-30  # less of any distribution is the best token alone too, and fp32 would have 0


@dataclass(frozen=True, slots=True)
class Span:
    """The numbers that a field takes: from `low` to `high`, and 0 where `or_zero`."""

    low: float
    high: float
    or_zero: bool = False
    above_low: bool = False  # `low` itself is none of them

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or isinstance(value, bool):
            return False
        inside = self.low <= value <= self.high  # a NaN is inside of nothing
        return (inside and not (self.above_low and value == self.low)) or (
            self.or_zero and value == 0
        )

    def __str__(self) -> str:
        span = f"in {'(' if self.above_low else '['}{self.low:g}, {self.high:g}]"
        return f"0 or {span}" if self.or_zero else span

    def value(
        self, name: str, value: float | None, default: float | None, otherwise: float
    ) -> float:
        """`value`, else the checkpoint's, else the engine's. Raises InvalidRequest naming the field."""
        if value is None:
            value = otherwise if default is None else default
        if value not in self:
            raise InvalidRequest(f"{name} must be {self}, got {_shown(value)}")
        return float(value)


# The least are far from where fp32 ends: what logits become, divided by them, stays finite.
TEMPERATURE = Span(0.001, 2, or_zero=True)
REPETITION_PENALTY = Span(0.001, 10)
TOP_P = Span(0, 1, above_low=True)
MIN_P = Span(0, 1)
PENALTY = Span(-2, 2)
LOGIT_BIAS = Span(-100, 100)


@dataclass(frozen=True, slots=True)
class SparseParams:
    """Block-sparse decode. What is unset becomes what the engine's settings say."""

    budget_tokens: int | None = None  # that a token attends to; 0: all, so dense
    min_context: int | None = None  # under that it is dense
    layers_dense: Sequence[int] | None = None  # first layers, which are always dense; empty: unset


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """vLLM's names. None: unset, so the checkpoint's generation_config decides, else the engine's default."""

    temperature: float | None = None  # 0: greedy
    top_p: float | None = None
    top_k: int | None = None  # 0: all
    min_p: float | None = None
    seed: int | None = None  # unset: drawn at random
    max_tokens: int | None = None  # unset: up to the context
    min_tokens: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_logprobs_start: int | None = None  # the first of the prompt's places that is wanted
    n: int | None = None
    best_of: int | None = None  # unset: n
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None  # unset or empty: all
    bad_token_ids: Sequence[int] | None = None
    echo: bool | None = None
    sparse: SparseParams | Mapping[str, object] | None = None  # unset: as the engine is set, dense
    # Known, and refused while it is not served:
    bad_words: Sequence[str] | None = None


UNSERVED = ("bad_words",)


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """A checkpoint's generation_config.json, as far as sampling goes. None: it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    eos_token_ids: tuple[int, ...] = ()
    ignored: tuple[str, ...] = ()  # fields that change the output and are not applied


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a request's fields are measured against."""

    vocab_size: int
    max_context_tokens: int
    defaults: GenerationDefaults
    sparse: SparseLimits | None = None  # None: no layer can be


@dataclass(frozen=True, slots=True)
class TextRules:
    """What the text layer does with the tokens; the engine never sees it."""

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0  # stop strings wait for this many
    echo: bool = False  # the prompt's text comes first


@dataclass(frozen=True, slots=True)
class Replies:
    """How many replies are wanted, and how many are drawn to choose them from."""

    n: int = 1
    best_of: int = 1


def check_prompt(
    token_ids: Sequence[int], limits: ModelLimits, *, name: str = "prompt", min_room: int = 1
) -> None:
    """Raise InvalidRequest if a prompt is empty, names a token that does not exist, or leaves less room in the context."""
    if not token_ids:
        raise InvalidRequest(f"{name} must hold at least one token, got 0")
    most = limits.max_context_tokens - min_room
    if len(token_ids) > most:
        raise InvalidRequest(
            f"{name} must hold at most {most} tokens, with a context of "
            f"{limits.max_context_tokens}, got {len(token_ids)}"
        )
    check_token_ids(name, token_ids, limits)


def resolve_replies(params: SamplingParams) -> Replies:
    """Check `n` and `best_of`. Raises InvalidRequest."""
    n = _whole("n", params.n, 1, 1, MAX_REPLIES)
    return Replies(n, _whole("best_of", params.best_of, n, n, MAX_REPLIES))


def resolve(
    params: SamplingParams, limits: ModelLimits, num_prompt_tokens: int
) -> tuple[Sampling, TextRules]:
    """Fill in defaults and check every field. Raises InvalidRequest or Unimplemented naming field and value."""
    _refuse_unserved(params)
    resolve_replies(params)
    defaults = limits.defaults
    room = limits.max_context_tokens - num_prompt_tokens
    max_tokens = _whole("max_tokens", params.max_tokens, room, 1, None)
    min_tokens = _whole("min_tokens", params.min_tokens, 0, 0, None)
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens must be at most max_tokens ({_shown(max_tokens)}), got {_shown(min_tokens)}"
        )
    top_p = TOP_P.value("top_p", params.top_p, defaults.top_p, 1.0)
    sampling = Sampling(
        temperature=TEMPERATURE.value("temperature", params.temperature, defaults.temperature, 1.0),
        top_k=_whole("top_k", params.top_k, defaults.top_k or 0, 0, 2**31 - 1),
        top_p=max(top_p, LEAST_TOP_P),
        min_p=MIN_P.value("min_p", params.min_p, defaults.min_p, 0.0),
        seed=_seed(params.seed),
        max_tokens=min(max_tokens, room),
        min_tokens=min(min_tokens, room),
        stop_token_ids=_stop_token_ids(params, limits),
        logprobs=check_logprobs("logprobs", params.logprobs, limits),
        prompt_logprobs=check_logprobs("prompt_logprobs", params.prompt_logprobs, limits),
        prompt_logprobs_start=_prompt_logprobs_start(params, num_prompt_tokens),
        repetition_penalty=REPETITION_PENALTY.value(
            "repetition_penalty", params.repetition_penalty, defaults.repetition_penalty, 1.0
        ),
        frequency_penalty=PENALTY.value("frequency_penalty", params.frequency_penalty, None, 0.0),
        presence_penalty=PENALTY.value("presence_penalty", params.presence_penalty, None, 0.0),
        logit_bias=_logit_bias(params.logit_bias, limits),
        allowed_token_ids=_token_ids("allowed_token_ids", params.allowed_token_ids, limits),
        bad_token_ids=_token_ids("bad_token_ids", params.bad_token_ids, limits),
        sparse=_sparse(params.sparse, limits.sparse),
    )
    _check_some_token_is_left(sampling, limits.vocab_size)
    rules = TextRules(
        stop=_stop_strings(params.stop),
        include_stop=bool(params.include_stop_str_in_output),
        skip_special_tokens=params.skip_special_tokens is not False,
        min_tokens=min_tokens,
        echo=bool(params.echo),
    )
    return sampling, rules


def _refuse_unserved(params: SamplingParams) -> None:
    for name in UNSERVED:
        value = getattr(params, name)
        if value is not None:
            raise Unimplemented(f"{name} is not served by this version (got {_shown(value)})")


def _stop_token_ids(params: SamplingParams, limits: ModelLimits) -> tuple[int, ...]:
    ids = _token_ids("stop_token_ids", params.stop_token_ids, limits, MAX_STOP_TOKEN_IDS)
    return (
        ids if params.ignore_eos else tuple(dict.fromkeys((*ids, *limits.defaults.eos_token_ids)))
    )


def _prompt_logprobs_start(params: SamplingParams, num_prompt_tokens: int) -> int:
    start = _whole(
        "prompt_logprobs_start", params.prompt_logprobs_start, 0, 0, num_prompt_tokens - 1
    )
    if params.prompt_logprobs_start is not None and params.prompt_logprobs is None:
        raise InvalidRequest(f"prompt_logprobs_start needs prompt_logprobs, got {start}")
    return max(start, 1)  # nothing predicts the first token


def _logit_bias(
    bias: Mapping[int, float] | None, limits: ModelLimits
) -> tuple[tuple[int, float], ...]:
    if bias is None:
        return ()
    if not isinstance(bias, Mapping):
        raise InvalidRequest(f"logit_bias must map token ids to numbers, got {_shown(bias)}")
    _token_ids("logit_bias", tuple(bias), limits, MAX_LOGIT_BIASES)
    return tuple(
        (token_id, LOGIT_BIAS.value(f"logit_bias[{token_id}]", value, None, 0.0))
        for token_id, value in bias.items()
    )


def _check_some_token_is_left(sampling: Sampling, vocab_size: int) -> None:
    """Raise InvalidRequest if a step of the request could not draw anything."""
    allowed, bad = set(sampling.allowed_token_ids), set(sampling.bad_token_ids)

    def is_none_left(forbidden: set[int]) -> bool:
        return allowed <= forbidden if allowed else len(forbidden) == vocab_size

    if is_none_left(bad):
        raise InvalidRequest(
            "allowed_token_ids and bad_token_ids must leave a token to draw, "
            f"got {len(allowed) or 'no'} allowed and {len(bad)} bad"
        )
    if sampling.min_tokens and is_none_left(bad.union(sampling.stop_token_ids)):
        raise InvalidRequest(
            "min_tokens must be 0 where allowed_token_ids and bad_token_ids leave only tokens that "
            f"stop, got {sampling.min_tokens}"
        )


def _sparse(
    wanted: SparseParams | Mapping[str, object] | None, limits: SparseLimits | None
) -> Sparse | None:
    if wanted is None:
        return None if limits is None else limits.default
    if isinstance(wanted, Mapping):
        names = [field.name for field in fields(SparseParams)]
        if unknown := [name for name in wanted if name not in names]:
            raise InvalidRequest(f"sparse must hold only {', '.join(names)}, got {_shown(unknown)}")
        wanted = SparseParams(**wanted)  # type: ignore[arg-type]  # checked below
    if not isinstance(wanted, SparseParams):
        raise InvalidRequest(f"sparse must be SparseParams or a mapping, got {_shown(wanted)}")
    if limits is None:
        raise InvalidRequest(
            "sparse must not be set for this model: all its layers have a window, so that none "
            f"attends to long contexts, got {_shown(wanted)}"
        )
    unset, budget = limits.unset, wanted.budget_tokens
    if budget != 0 or isinstance(budget, bool):
        name, least = "sparse.budget_tokens, if not 0,", limits.least_budget_tokens
        budget = _whole(name, budget, unset.budget_tokens, least, None)
    name, context = "sparse.min_context", wanted.min_context
    min_context = _whole(name, context, unset.min_context, 0, None)
    layers = _layers_dense(wanted.layers_dense, limits)
    return Sparse(budget, min_context, layers) if budget else None


def _layers_dense(wanted: Sequence[int] | None, limits: SparseLimits) -> int:
    """How many: they are the first."""
    if not isinstance(wanted, Sequence | None) or isinstance(wanted, str):
        raise InvalidRequest(f"sparse.layers_dense must be a list of layers, got {_shown(wanted)}")
    if not wanted:
        return limits.unset.layers_dense
    first = range(min(len(wanted), limits.num_layers))
    if list(wanted) != list(first) or bool in map(type, wanted):
        raise InvalidRequest(
            "sparse.layers_dense must be the model's first layers in order, 0, 1, ... up to "
            f"{limits.num_layers - 1} at most, got {_shown(wanted)}"
        )
    return len(first)


def _whole(name: str, value: int | None, default: int, low: int, high: int | None) -> int:
    if value is None:
        return default
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or value < low
        or (high is not None and value > high)
    ):
        span = f"at least {low}" if high is None else f"in {low}..{high}"
        raise InvalidRequest(f"{name} must be a whole number {span}, got {_shown(value)}")
    return value


def check_count(name: str, count: int, most: int) -> None:
    """Raise InvalidRequest unless a list has at least one entry, and at most so many."""
    if not 1 <= count <= most:
        raise InvalidRequest(f"{name} must hold 1..{most} entries, got {count}")


def check_logprobs(name: str, value: int | None, limits: ModelLimits) -> int | None:
    """How many best tokens a place; None: no logprobs. Raises InvalidRequest."""
    if value is None:
        return None
    return min(_whole(name, value, 0, 0, MAX_LOGPROBS), limits.vocab_size)


def _seed(seed: int | None) -> int:
    if seed is None:
        return secrets.randbits(64)
    return _whole("seed", seed, 0, -(2**63), 2**64 - 1) % 2**64


def _stop_strings(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    if len(strings) > MAX_STOP_STRINGS:
        raise InvalidRequest(
            f"stop must hold at most {MAX_STOP_STRINGS} strings, got {len(strings)}"
        )
    for string in strings:
        if not isinstance(string, str) or not 1 <= len(string) <= MAX_STOP_CHARS:
            shown = repr(string) if len(str(string)) < 40 else f"{len(string)} characters"
            raise InvalidRequest(
                f"stop must hold strings of 1..{MAX_STOP_CHARS} characters, got {shown}"
            )
    return strings


def _token_ids(
    name: str, token_ids: Sequence[int] | None, limits: ModelLimits, most: int | None = None
) -> tuple[int, ...]:
    """Each once. At most `most`, by default as many as there are."""
    if token_ids is None:
        return ()
    if not isinstance(token_ids, Sequence):
        raise InvalidRequest(f"{name} must be a list of token ids, got {_shown(token_ids)}")
    most = limits.vocab_size if most is None else most
    if len(token_ids) > most:
        raise InvalidRequest(f"{name} must hold at most {most} ids, got {len(token_ids)}")
    check_token_ids(name, token_ids, limits)
    return tuple(dict.fromkeys(token_ids))


def check_token_ids(name: str, token_ids: Sequence[int], limits: ModelLimits) -> None:
    """Raise InvalidRequest unless all are in the vocabulary."""
    if not token_ids:
        return
    if (
        set(map(type, token_ids)) == {int}
        and 0 <= min(token_ids) <= max(token_ids) < limits.vocab_size
    ):
        return  # several times as fast as the search for the one to name
    for token_id in token_ids:
        if type(token_id) is not int or not 0 <= token_id < limits.vocab_size:
            raise InvalidRequest(
                f"{name} must hold whole numbers in 0..{limits.vocab_size - 1}, "
                f"got {_shown(token_id)}"
            )


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except ValueError:  # an int of more digits than Python writes
        text = type(value).__name__
    return text if len(text) <= MAX_SHOWN_CHARS else f"{text[:MAX_SHOWN_CHARS]}..."
