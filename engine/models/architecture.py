"""What an architecture is: one data file for each, `architectures/<name>.toml`. Reads no checkpoint.

A new architecture of known blocks is one more file there. The file says which keys of config.json have a meaning, what
transformers takes for those that are absent, how the blocks are put together and what their tensors are called.
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any, Literal

from vivace.engine.models.spec import Activation, QkNorm, Scoring

# Read for every architecture.
CORE_KEYS = frozenset(
    {
        "architectures",
        "eos_token_id",
        "head_dim",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "original_max_position_embeddings",
        "partial_rotary_factor",
        "quantization_config",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "vocab_size",
    }
)
# Without effect on what is computed, whatever the architecture.
HARMLESS_KEYS = frozenset(
    {
        "attention_dropout",
        "auto_map",  # names code that the checkpoint brings; it is never looked at
        "bos_token_id",
        "dtype",
        "initializer_range",
        "model_type",
        "output_router_logits",
        "pad_token_id",
        "router_aux_loss_coef",
        "torch_dtype",
        "transformers_version",
        "use_cache",
    }
)

Flag = bool | str  # a string is the config key that says it
WindowRule = Literal[
    "every_layer",
    "alternate",  # the first, the third ...
    "all_but_each_nth",  # n is `sliding_window_pattern`
    "from_max_window_layers",
    "alternate_below_max_window_layers",
    "without_rotation",  # the layers that do not rotate
]


@dataclass(frozen=True, slots=True)
class Blocks:
    """How the layers are built."""

    activation_key: str = "hidden_act"
    norms: Literal["before", "after", "both"] = "before"  # of attention and of the MLP
    norm_offset: float = 0.0  # added to the weights of all norms
    qk_norm: QkNorm = QkNorm.NONE
    qkv_bias: Flag = False
    out_bias: Flag = False
    mlp_bias: Flag = False
    sinks: bool = False
    embed_scale: Literal["none", "sqrt_model_size"] = "none"
    windows: WindowRule | None = None  # which layers have one, where config.json does not list them


@dataclass(frozen=True, slots=True)
class Moe:
    """How the experts are built and chosen; the names are keys of config.json."""

    hidden_size: str
    renormalize: Flag
    shared_hidden_size: str | None = None  # of the expert that every token goes to
    scoring: Scoring = Scoring.SOFTMAX
    router_bias: bool = False
    expert_bias: bool = False
    activation: Activation | None = None  # instead of the config's


@dataclass(frozen=True, slots=True)
class Architecture:
    """One data file. In tensor names, {i} stands for the layer and {e} for the expert."""

    reads: frozenset[str]  # beyond CORE_KEYS
    harmless: frozenset[str]  # beyond HARMLESS_KEYS
    refused: frozenset[str]  # keys that must be absent, null or false
    aliases: Mapping[str, str]  # keys that mean another key
    defaults: Mapping[str, Any]  # key -> what transformers takes where it is absent
    blocks: Blocks
    moe: Moe | None
    weights: Mapping[str, list[str]]  # ours -> the tensors it is joined from, below each other
    transposed: frozenset[str]  # weights that are stored [inputs, outputs]
    interleaved: frozenset[str]  # weights whose gate and up rows alternate


@cache
def supported() -> tuple[str, ...]:
    """The architectures that there are files for, as config.json names them."""
    files = (resources.files("vivace.engine.models") / "architectures").iterdir()
    return tuple(sorted(f.name.removesuffix(".toml") for f in files if f.name.endswith(".toml")))


@cache
def read_architecture(name: str) -> Architecture:
    """The file of a supported architecture. It is ours: a mistake in it is a bug, not an ArtifactError."""
    path = resources.files("vivace.engine.models") / "architectures" / f"{name}.toml"
    table = tomllib.loads(path.read_text("utf-8"))
    names = ("reads", "harmless", "refused", "transposed", "interleaved")
    sets: dict[str, Any] = {key: frozenset(table.pop(key, ())) for key in names}
    return Architecture(
        **sets,
        aliases=table.pop("aliases", {}),
        blocks=Blocks(**_typed(table.pop("blocks", {}))),
        moe=Moe(**_typed(table.pop("moe"))) if "moe" in table else None,
        **table,
    )


def _typed(table: dict[str, Any]) -> dict[str, Any]:
    """The table with members of enums for their names."""
    enums = {"qk_norm": QkNorm, "scoring": Scoring, "activation": Activation}
    return {key: enums[key](value) if key in enums else value for key, value in table.items()}
