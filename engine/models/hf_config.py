"""config.json to a `ModelSpec`, by the architecture's data file. Nothing else reads what a model is.

A checkpoint is read by its architecture or refused; code that it brings is never looked at. A key that the data file does
not list is refused by name, since it may change what the model computes.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from vivace.engine.errors import ArtifactError
from vivace.engine.models.architecture import (
    Architecture,
    Flag,
    Moe,
    Norms,
    WindowRule,
    read_architecture,
    supported,
)
from vivace.engine.models.hf_rope import read_ropes
from vivace.engine.models.json_fields import Fields, read_fields
from vivace.engine.models.spec import (
    Activation,
    AttentionSpec,
    LayerSpec,
    MlpSpec,
    ModelSpec,
    MoeSpec,
    NormSpec,
    RopeSpec,
)

# Layers and experts are objects here: a wild number must not fill the memory.
MAX_LAYERS = 4096
MAX_EXPERTS = 1024  # of a layer: what the ops can hold
MAX_EXPERTS_IN_ALL = 1 << 17
MAX_HEAD_DIM = 1024  # what the ops can hold
ACTIVATIONS = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "gelu_new": Activation.GELU_TANH,
}


def read_spec(directory: Path) -> ModelSpec:
    """Raises ArtifactError naming what cannot be read, is not supported, or does not fit
    together."""
    return spec_of(read_fields(directory / "config.json"))


def spec_of(config: Fields) -> ModelSpec:
    """What the fields of a config.json say. Raises ArtifactError as `read_spec`."""
    name = architecture_name(config)
    if name not in supported():
        raise ArtifactError(
            f"{config.file}: architecture {name} is not supported; "
            f"supported are {', '.join(supported())}"
        )
    if "quantization_config" in config:
        method = config.table("quantization_config").raw("quant_method")
        raise ArtifactError(
            f"{config.file}: quantization_config: {method or 'quantized'} weights are not supported"
        )
    architecture = read_architecture(name)
    config = _checked(config, architecture)
    model_size = config.whole("hidden_size")
    return ModelSpec(
        architecture=name,
        vocab_size=config.whole("vocab_size"),
        model_size=model_size,
        layers=_layers(config, architecture),
        norm=_norm(config, architecture),
        tied_embeddings=config.flag("tie_word_embeddings", False),
        max_context_tokens=config.whole("max_position_embeddings", low=2),
        embed_scale=model_size**0.5 if architecture.blocks.scaled_embeddings else 1.0,
        final_softcap=_optional_real(config, "final_logit_softcapping"),
    )


def architecture_name(config: Fields) -> str:
    """The one architecture that config.json names. Raises ArtifactError."""
    names = config.raw("architectures")
    if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
        raise config.refuse("architectures", "it must list exactly one architecture")
    return names[0]


def _checked(config: Fields, architecture: Architecture) -> Fields:
    """The config with transformers' defaults and one name for each key, no key unknown."""
    config.only("model_type", architecture.model_type)
    config.only_keys(
        *architecture.reads,
        *architecture.harmless,
        *architecture.aliases,
        *architecture.refused,
    )
    for key in architecture.refused:
        config.only(key, False)
    return config.renamed(architecture.aliases).with_defaults(architecture.defaults)


def _layers(config: Fields, architecture: Architecture) -> tuple[LayerSpec, ...]:
    """Every layer, first to last."""
    num_layers = config.whole("num_hidden_layers", high=MAX_LAYERS)
    head_dim = _head_dim(config)
    rotates = _rotating_layers(config, num_layers)
    windows = _windows(config, architecture.blocks.windows, rotates)
    has_window = [window is not None for window in windows]
    ropes = read_ropes(config, architecture, head_dim, rotates=rotates, has_window=has_window)
    norms = architecture.blocks.norms
    is_sparse = _sparse_layers(config, architecture.moe, num_layers)
    moe = None if architecture.moe is None else _moe(config, architecture, architecture.moe)
    mlp = None if all(is_sparse) else _mlp(config, architecture, "intermediate_size")
    layers = []
    for rope, window, sparse in zip(ropes, windows, is_sparse, strict=True):
        block = moe if sparse else mlp
        assert block is not None
        layers.append(
            LayerSpec(
                attention=_attention(config, architecture, head_dim, rope=rope, window=window),
                mlp=block,
                norms_before=norms is not Norms.AFTER,
                norms_after=norms is not Norms.BEFORE,
            )
        )
    return tuple(layers)


def _attention(
    config: Fields,
    architecture: Architecture,
    head_dim: int,
    *,
    rope: RopeSpec,
    window: int | None,
) -> AttentionSpec:
    blocks = architecture.blocks
    num_heads = config.whole("num_attention_heads")
    num_kv_heads = config.whole("num_key_value_heads", num_heads)
    if num_heads % num_kv_heads:
        raise config.refuse(
            "num_key_value_heads", f"it must divide the {num_heads} attention heads"
        )
    return AttentionSpec(
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=rope,
        scale=config.real("query_pre_attn_scalar", head_dim) ** -0.5,
        norm=_norm(config, architecture),
        qk_norm=blocks.qk_norm,
        qkv_bias=_flag(config, blocks.qkv_bias),
        out_bias=_flag(config, blocks.out_bias),
        window=window,
        softcap=_optional_real(config, "attn_logit_softcapping"),
        sinks=blocks.sinks,
    )


def _head_dim(config: Fields) -> int:
    num_heads, model_size = config.whole("num_attention_heads"), config.whole("hidden_size")
    if "head_dim" not in config and model_size % num_heads:
        raise config.refuse(
            "hidden_size", f"{num_heads} heads do not divide it, and head_dim is missing"
        )
    head_dim = config.whole("head_dim", model_size // num_heads, high=MAX_HEAD_DIM)
    if head_dim % 2:
        raise config.refuse("head_dim", "rotary position embedding needs an even one")
    return head_dim


def _norm(config: Fields, architecture: Architecture) -> NormSpec:
    return NormSpec(config.real("rms_norm_eps"), architecture.blocks.norm_offset)


def _mlp(config: Fields, architecture: Architecture, size_key: str) -> MlpSpec:
    return MlpSpec(
        hidden_size=config.whole(size_key),
        activation=_activation(config, architecture),
        bias=_flag(config, architecture.blocks.mlp_bias),
    )


def _activation(config: Fields, architecture: Architecture) -> Activation:
    return ACTIVATIONS[config.choice(architecture.blocks.activation_key, *ACTIVATIONS)]


def _moe(config: Fields, architecture: Architecture, moe: Moe) -> MoeSpec:
    num_layers = config.whole("num_hidden_layers")
    most = min(MAX_EXPERTS, MAX_EXPERTS_IN_ALL // num_layers)
    num_experts = config.whole("num_experts", high=most)
    top_k = config.whole("num_experts_per_tok")
    if top_k > num_experts:
        raise config.refuse("num_experts_per_tok", f"there are {num_experts} experts")
    shared_key = moe.shared_hidden_size
    return MoeSpec(
        num_experts=num_experts,
        top_k=top_k,
        hidden_size=config.whole(moe.hidden_size),
        renormalize=_flag(config, moe.renormalize),
        activation=moe.activation or _activation(config, architecture),
        router_bias=moe.router_bias,
        expert_bias=moe.expert_bias,
        shared=None if shared_key is None else _mlp(config, architecture, shared_key),
        alpha=config.real("swiglu_alpha", 1.702),
        limit=config.real("swiglu_limit", 7.0),
    )


def _sparse_layers(config: Fields, moe: Moe | None, num_layers: int) -> list[bool]:
    """Which layers have experts."""
    if moe is None:
        return [False] * num_layers
    step = config.whole("decoder_sparse_step", 1)
    dense = set(config.whole_list("mlp_only_layers"))
    return [i not in dense and (i + 1) % step == 0 for i in range(num_layers)]


def _rotating_layers(config: Fields, num_layers: int) -> list[bool]:
    """Which layers have rotary embedding."""
    said = config.whole_list("no_rope_layers")
    if said:
        if len(said) < num_layers or not set(said) <= {0, 1}:
            raise config.refuse("no_rope_layers", f"it must hold {num_layers} of 0 and 1")
        return [one == 1 for one in said[:num_layers]]
    interval = config.whole("no_rope_layer_interval", num_layers + 1)
    return [(i + 1) % interval != 0 for i in range(num_layers)]


def _windows(config: Fields, rule: WindowRule | None, rotates: list[bool]) -> list[int | None]:
    """The window of each layer. `layer_types` says who has one, else the architecture's rule."""
    num_layers = len(rotates)
    if rule is None:
        return [None] * num_layers
    window = None
    if config.flag("use_sliding_window", True) and "sliding_window" in config:
        window = config.whole("sliding_window")
    kinds = config.raw("layer_types")
    if kinds is not None:
        known = ("full_attention", "sliding_attention")
        is_list = isinstance(kinds, list) and all(kind in known for kind in kinds)
        if not is_list or len(kinds) != num_layers:
            raise config.refuse(
                "layer_types", f"it must list {num_layers} of {' and '.join(known)}"
            )
        has_window = [kind == "sliding_attention" for kind in kinds]
        if any(has_window) and window is None:
            raise config.refuse("layer_types", "sliding_attention needs a sliding_window")
    elif window is None:
        return [None] * num_layers
    else:
        has_window = [WINDOW_RULES[rule](config, i, rotates[i]) for i in range(num_layers)]
    return [window if has else None for has in has_window]


WINDOW_RULES: Mapping[WindowRule, Callable[[Fields, int, bool], bool]] = {
    WindowRule.EVERY_LAYER: lambda config, i, rotates: True,
    WindowRule.ALTERNATE: lambda config, i, rotates: i % 2 == 0,
    WindowRule.ALL_BUT_EACH_NTH: lambda config, i, rotates: (
        (i + 1) % config.whole("sliding_window_pattern") != 0
    ),
    WindowRule.FROM_MAX_WINDOW_LAYERS: lambda config, i, rotates: (
        i >= config.whole("max_window_layers", low=0)
    ),
    WindowRule.ALTERNATE_BELOW_MAX_WINDOW_LAYERS: lambda config, i, rotates: (
        i % 2 == 0 and i < config.whole("max_window_layers", low=0)
    ),
    WindowRule.WITHOUT_ROTATION: lambda config, i, rotates: not rotates,
}


def _flag(config: Fields, flag: Flag) -> bool:
    return config.flag(flag, False) if isinstance(flag, str) else flag


def _optional_real(config: Fields, key: str) -> float | None:
    return config.real(key) if key in config else None
