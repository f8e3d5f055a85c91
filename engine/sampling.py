"""What a caller may ask of a generation, checked once at the door. Holds no state.

`SamplingParams` is what callers write, every field unset by default; `resolve` turns it into the engine's `Sampling`
and the text layer's `TextRules`, with the checkpoint's defaults filled in, or says which field is wrong.
"""

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

from vivace.engine.errors import InvalidRequest, Unimplemented
from vivace.engine.events import Sampling

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_TEMPERATURE = 2.0


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
    # Known, and refused while they are not served:
    n: int | None = None
    best_of: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: Sequence[int] | None = None
    bad_words: Sequence[str] | None = None


NEUTRAL = {  # values of unserved fields that ask for nothing
    "n": 1,
    "best_of": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0,
    "repetition_penalty": 1,
}
UNSERVED = (*NEUTRAL, "logit_bias", "allowed_token_ids", "bad_words")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """A checkpoint's generation_config.json, as far as sampling goes. None: it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    eos_token_ids: tuple[int, ...] = ()
    ignored: tuple[str, ...] = ()  # fields that change the output and are not applied


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """What a request's fields are measured against."""

    vocab_size: int
    max_context_tokens: int
    defaults: GenerationDefaults


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


def resolve(
    params: SamplingParams, limits: ModelLimits, num_prompt_tokens: int
) -> tuple[Sampling, TextRules]:
    """Fill in defaults and check every field. Raises InvalidRequest or Unimplemented naming field and value."""
    _refuse_unserved(params)
    defaults = limits.defaults
    room = limits.max_context_tokens - num_prompt_tokens
    max_tokens = _whole("max_tokens", params.max_tokens, room, 1, None)
    min_tokens = _whole("min_tokens", params.min_tokens, 0, 0, None)
    if min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens must be at most max_tokens ({max_tokens}), got {min_tokens}"
        )
    stop_ids = tuple(params.stop_token_ids or ())
    if len(stop_ids) > MAX_STOP_TOKEN_IDS:
        raise InvalidRequest(
            f"stop_token_ids must hold at most {MAX_STOP_TOKEN_IDS} ids, got {len(stop_ids)}"
        )
    check_token_ids("stop_token_ids", stop_ids, limits)
    if not params.ignore_eos:
        stop_ids = tuple(dict.fromkeys((*stop_ids, *defaults.eos_token_ids)))
    sampling = Sampling(
        temperature=_real("temperature", params.temperature, defaults.temperature, 1.0, "[0, 2]"),
        top_k=_whole("top_k", params.top_k, defaults.top_k or 0, 0, 2**31 - 1),
        top_p=_real("top_p", params.top_p, defaults.top_p, 1.0, "(0, 1]"),
        min_p=_real("min_p", params.min_p, defaults.min_p, 0.0, "[0, 1]"),
        seed=_seed(params.seed),
        max_tokens=min(max_tokens, room),
        min_tokens=min(min_tokens, room),
        stop_token_ids=stop_ids,
        logprobs=check_logprobs("logprobs", params.logprobs, limits),
        prompt_logprobs=check_logprobs("prompt_logprobs", params.prompt_logprobs, limits),
    )
    rules = TextRules(
        stop=_stop_strings(params.stop),
        include_stop=bool(params.include_stop_str_in_output),
        skip_special_tokens=params.skip_special_tokens is not False,
        min_tokens=min_tokens,
    )
    return sampling, rules


def _refuse_unserved(params: SamplingParams) -> None:
    names = [field.name for field in fields(params) if field.name in UNSERVED]
    for name in names:
        value = getattr(params, name)
        if isinstance(value, float) and not math.isfinite(value):
            raise InvalidRequest(f"{name} must be finite, got {value}")
        if value is not None and value != NEUTRAL.get(name):
            raise Unimplemented(f"{name} is not served by this version (got {value!r})")


def _real(
    name: str, value: float | None, default: float | None, otherwise: float, span: str
) -> float:
    """`value`, else the checkpoint's, else the engine's; inside `span`, which is written as people write intervals."""
    if value is None:
        value = otherwise if default is None else default
    low, high = (float(end) for end in span[1:-1].split(","))
    inside = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
    if not inside or (span[0] == "(" and value == low):  # a NaN is inside of nothing
        raise InvalidRequest(f"{name} must be in {span}, got {value!r}")
    return float(value)


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
        raise InvalidRequest(f"{name} must be a whole number {span}, got {value!r}")
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


def check_token_ids(name: str, token_ids: Sequence[int], limits: ModelLimits) -> None:
    """Raise InvalidRequest unless all are in the vocabulary."""
    for token_id in token_ids:
        if (
            isinstance(token_id, bool)
            or not isinstance(token_id, int)
            or not 0 <= token_id < limits.vocab_size
        ):
            raise InvalidRequest(
                f"{name} must hold whole numbers in 0..{limits.vocab_size - 1}, got {token_id!r}"
            )
