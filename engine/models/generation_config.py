"""generation_config.json: how a checkpoint wants to be sampled where a request does not say."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vivace.engine.models.json_fields import Fields, read_fields
from vivace.engine.sampling import (
    MIN_P,
    REPETITION_PENALTY,
    TEMPERATURE,
    TOP_P,
    GenerationDefaults,
    Span,
)


def read_generation_defaults(directory: Path) -> GenerationDefaults:
    """What generation_config.json (which may be absent) sets, and the end tokens of it and of
    config.json.

    `do_sample` is not looked at: a temperature of 0 is how a request asks for greedy. Raises
    ArtifactError.
    """
    config = read_fields(directory / "config.json")
    vocab_size = config.whole("vocab_size")
    path = directory / "generation_config.json"
    fields = read_fields(path) if path.exists() else Fields(str(path), {})
    eos = (
        *fields.token_ids("eos_token_id", vocab_size),
        *config.token_ids("eos_token_id", vocab_size),
    )
    top_k = fields.whole("top_k", low=-1) if "top_k" in fields else None
    return GenerationDefaults(
        temperature=_in_span(fields, "temperature", TEMPERATURE),
        top_p=_in_span(fields, "top_p", TOP_P),
        top_k=0 if top_k == -1 else top_k,  # two ways to write "all"
        min_p=_in_span(fields, "min_p", MIN_P),
        repetition_penalty=_in_span(fields, "repetition_penalty", REPETITION_PENALTY),
        eos_token_ids=tuple(dict.fromkeys(eos)),
        ignored=tuple(
            key for key, neutral in NOT_APPLIED.items() if _differs(fields, key, neutral)
        ),
    )


# Fields of generation_config.json that change what is generated and are not applied, with the value
# that asks for nothing.
NOT_APPLIED: Mapping[str, Any] = {
    "encoder_repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "typical_p": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "top_h": None,
    "num_beams": 1,
    "penalty_alpha": None,
    "guidance_scale": 1,
    "sequence_bias": None,
    "bad_words_ids": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "max_new_tokens": None,
    "exponential_decay_length_penalty": None,
    "stop_strings": None,
}


def _differs(fields: Fields, key: str, neutral: Any) -> bool:
    return key in fields and fields.raw(key) not in (neutral, [], {})


def _in_span(fields: Fields, key: str, span: Span) -> float | None:
    """A number in the span, None if absent."""
    value = fields.raw(key)
    if value is None:
        return None
    if value not in span:
        raise fields.refuse(key, f"it must be {span}")
    return float(value)
