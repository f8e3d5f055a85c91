"""What a model is: its layers as data. Read from a checkpoint's config.json by `read_spec`; nothing
else reads that file.

A checkpoint is read by its architecture or refused; code that it brings (`auto_map`) is never
looked at. Every field that would change what the model computes is either carried in the spec or
refused by name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vivace.engine.errors import ArtifactError
from vivace.engine.models.json_fields import Fields, read_fields
from vivace.engine.sampling import GenerationDefaults

MAX_LAYERS = 4096  # a layer is an object here: a wild number must not fill the memory
ROPE_KEYS = (
    "rope_theta",
    "rope_type",
    "type",
    "partial_rotary_factor",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama-3's stretch of the low rotary frequencies."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding of one kind of layer."""

    theta: float
    rotary_dim: int  # leading elements of a head that are rotated
    scaling: Llama3Scaling | None = None


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Causal self-attention with grouped heads."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeSpec
    qk_norm: bool  # RMSNorm over each head of q and k before the rotation
    norm_eps: float  # of those two norms
    scale: float


@dataclass(frozen=True, slots=True)
class MlpSpec:
    """down(silu(gate(x)) * up(x))."""

    hidden_size: int


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One decoder layer: norm, attention, add, norm, MLP, add."""

    attention: AttentionSpec
    mlp: MlpSpec


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """A decoder-only model. `names` is the tensor-name map (`models/names/<names>.json`)."""

    architecture: str
    names: str
    vocab_size: int
    model_size: int
    layers: tuple[LayerSpec, ...]
    norm_eps: float
    tied_embeddings: bool
    max_context_tokens: int


def read_spec(directory: Path) -> ModelSpec:
    """Raises ArtifactError naming what cannot be read, is not supported, or does not fit
    together."""
    config = read_fields(directory / "config.json")
    architecture = _architecture(config)
    if architecture not in ARCHITECTURES:
        raise ArtifactError(
            f"{config.file}: architecture {architecture} is not supported; "
            f"supported are {', '.join(ARCHITECTURES)}"
        )
    if "quantization_config" in config:
        raise config.refuse("quantization_config", "quantized checkpoints are not supported")
    return ARCHITECTURES[architecture](config, architecture)


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
        temperature=_in_span(fields, "temperature", 0, 2),
        top_p=_in_span(fields, "top_p", 0, 1, above=True),
        top_k=0 if top_k == -1 else top_k,  # two ways to write "all"
        min_p=_in_span(fields, "min_p", 0, 1),
        eos_token_ids=tuple(dict.fromkeys(eos)),
        ignored=tuple(
            key for key, neutral in NOT_APPLIED.items() if _differs(fields, key, neutral)
        ),
    )


# Fields of generation_config.json that change what is generated and are not applied, with the value
# that asks for nothing.
NOT_APPLIED: Mapping[str, Any] = {
    "repetition_penalty": 1,
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


def _in_span(
    fields: Fields, key: str, low: float, high: float, *, above: bool = False
) -> float | None:
    """A number in low..high (above: past low), None if absent."""
    value = fields.raw(key)
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or (above and value == low):
        raise fields.refuse(key, f"it must be in {'(' if above else '['}{low}, {high}]")
    return float(value)


def _architecture(config: Fields) -> str:
    names = config.raw("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise config.refuse("architectures", "it must list exactly one architecture")
    return names[0]


def _llama(config: Fields, architecture: str) -> ModelSpec:
    config.only("attention_bias", False)
    config.only("mlp_bias", False)
    _no_windows(config, unless_said=True)
    num_heads = config.whole("num_attention_heads")
    if "head_dim" not in config and config.whole("hidden_size") % num_heads:
        raise config.refuse(
            "hidden_size", f"{num_heads} heads do not divide it, and head_dim is missing"
        )
    head_dim = config.whole("head_dim", config.whole("hidden_size") // num_heads)
    return _dense(config, architecture, "llama", head_dim=head_dim, qk_norm=False)


def _qwen3(config: Fields, architecture: str) -> ModelSpec:
    config.only("attention_bias", False)
    _no_windows(config, unless_said=False)
    head_dim = config.whole("head_dim", 128)  # transformers' default, whatever the number of heads
    return _dense(config, architecture, "qwen3", head_dim=head_dim, qk_norm=True)


# A later architecture is one more function here, and one more file in names/.
ARCHITECTURES: Mapping[str, Callable[[Fields, str], ModelSpec]] = {
    "LlamaForCausalLM": _llama,
    "Qwen3ForCausalLM": _qwen3,
}


def _dense(
    config: Fields, architecture: str, names: str, *, head_dim: int, qk_norm: bool
) -> ModelSpec:
    """A decoder whose layers are all the same."""
    config.only("hidden_act", "silu", "swish")  # two names of one function
    num_heads = config.whole("num_attention_heads")
    num_kv_heads = config.whole("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise config.refuse(
            "num_key_value_heads", f"it must divide the {num_heads} attention heads"
        )
    if head_dim % 2:
        raise config.refuse("head_dim", "rotary position embedding needs an even one")
    max_context_tokens = config.whole("max_position_embeddings", low=2)
    norm_eps = config.real("rms_norm_eps", 1e-6)
    layer = LayerSpec(
        AttentionSpec(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rope=_rope(config, head_dim, max_context_tokens),
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            scale=head_dim**-0.5,
        ),
        MlpSpec(hidden_size=config.whole("intermediate_size")),
    )
    return ModelSpec(
        architecture=architecture,
        names=names,
        vocab_size=config.whole("vocab_size"),
        model_size=config.whole("hidden_size"),
        layers=(layer,) * config.whole("num_hidden_layers", high=MAX_LAYERS),
        norm_eps=norm_eps,
        tied_embeddings=config.flag("tie_word_embeddings", False),
        max_context_tokens=max_context_tokens,
    )


def _no_windows(config: Fields, *, unless_said: bool) -> None:
    """`unless_said`: whether a window without `use_sliding_window` is meant to be used."""
    if "sliding_window" in config and config.flag("use_sliding_window", unless_said):
        raise config.refuse("sliding_window", "sliding windows are not supported")
    kinds = config.raw("layer_types")
    if kinds is not None and kinds != ["full_attention"] * config.whole("num_hidden_layers"):
        raise config.refuse("layer_types", "only full_attention in every layer is supported")


def _rope(config: Fields, rotary_dim: int, max_position: int) -> RopeSpec:
    """Both ways of writing it: `rope_theta` and `rope_scaling`, or one `rope_parameters`."""
    # With both, transformers takes the older.
    table = config.table("rope_scaling" if config.raw("rope_scaling") else "rope_parameters")
    table.known(*ROPE_KEYS)
    theta = table.real("rope_theta", config.real("rope_theta", 10000.0))
    config.only("partial_rotary_factor", 1, 1.0)
    table.only("partial_rotary_factor", 1, 1.0)
    key = "rope_type" if "rope_type" in table else "type"  # its older name
    table.only(key, "default", "llama3")
    scaling = None
    if table.raw(key) == "llama3":
        original = table.whole("original_max_position_embeddings", max_position)
        scaling = Llama3Scaling(
            factor=table.real("factor"),
            low_freq_factor=table.real("low_freq_factor"),
            high_freq_factor=table.real("high_freq_factor"),
            original_max_position=config.whole("original_max_position_embeddings", original),
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise table.refuse("high_freq_factor", "it must be above low_freq_factor")
    return RopeSpec(theta, rotary_dim, scaling)
