"""What an architecture is: one data file for each, `architectures/<name>.toml`, over what all have in common
(`common.toml`). Reads no checkpoint.

A new architecture of known blocks is one more file there. The file says which keys of config.json have a meaning, what
transformers takes for those that are absent, how the blocks are put together and what their tensors are called.
"""

import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from importlib import resources
from typing import Any

from vivace.engine.models.spec import Activation, QkNorm

FOLDER = resources.files("vivace.engine.models") / "architectures"
COMMON = "common"
Flag = bool | str  # a string is the config key that says it


class Norms(Enum):
    """Where attention and the MLP are normed."""

    BEFORE = "before"
    AFTER = "after"
    BOTH = "both"


class WindowRule(Enum):
    """Which layers have a window, where config.json does not list them."""

    EVERY_LAYER = "every_layer"
    ALTERNATE = "alternate"  # the first, the third ...
    ALL_BUT_EACH_NTH = "all_but_each_nth"  # n is `sliding_window_pattern`
    FROM_MAX_WINDOW_LAYERS = "from_max_window_layers"
    ALTERNATE_BELOW_MAX_WINDOW_LAYERS = "alternate_below_max_window_layers"
    WITHOUT_ROTATION = "without_rotation"  # the layers that do not rotate


@dataclass(frozen=True, slots=True)
class Blocks:
    """How the layers are built."""

    activation_key: str = "hidden_act"
    norms: Norms = Norms.BEFORE
    norm_offset: float = 0.0  # added to the weights of all norms
    qk_norm: QkNorm = QkNorm.NONE
    qkv_bias: Flag = False
    out_bias: Flag = False
    mlp_bias: Flag = False
    sinks: bool = False
    scaled_embeddings: bool = False  # by the square root of the model size
    windows: WindowRule | None = None


@dataclass(frozen=True, slots=True)
class Moe:
    """How the experts are built and chosen; the names are keys of config.json."""

    hidden_size: str
    renormalize: Flag
    shared_hidden_size: str | None = None  # of the expert that every token goes to
    router_bias: bool = False
    expert_bias: bool = False
    activation: Activation | None = None  # instead of the config's


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """One data file and what all have in common. In tensor names, {i} stands for the layer and {e} for the expert."""

    model_type: str  # of config.json
    reads: frozenset[str]  # keys of config.json with a meaning
    harmless: frozenset[str]  # keys without an effect on what is computed
    refused: frozenset[str] = frozenset()  # keys that must be absent, null or false
    aliases: Mapping[str, str]  # keys that mean another key
    defaults: Mapping[str, Any]  # key -> what transformers takes where it is absent
    default_rope: Mapping[str, Any]  # rope_parameters where there are none
    rope_types: frozenset[str] = frozenset({"default", "linear", "llama3", "yarn"})
    partial_rotation: bool = False  # whether heads may be rotated in part
    blocks: Blocks
    moe: Moe | None
    weights: Mapping[str, list[str]]  # ours -> the tensors it is joined from, below each other
    transposed: frozenset[str] = frozenset()  # weights that are stored [inputs, outputs]
    interleaved: frozenset[str] = frozenset()  # weights whose gate and up rows alternate


@cache
def supported() -> tuple[str, ...]:
    """The architectures that there are files for, as config.json names them."""
    names = {f.name.removesuffix(".toml") for f in FOLDER.iterdir() if f.name.endswith(".toml")}
    return tuple(sorted(names - {COMMON}))


@cache
def read_architecture(name: str) -> Architecture:
    """The file of a supported architecture. It is ours: a mistake in it is a bug, not an ArtifactError."""
    common, own = _read(COMMON), _read(name)
    harmless = frozenset(own.pop("harmless", ()))
    reads = frozenset((*common["reads"], *own.pop("reads"))) - harmless
    defaults = {**common["defaults"], **own.pop("defaults", {})}
    return Architecture(
        reads=reads,
        harmless=harmless | frozenset(common["harmless"]),
        aliases=own.pop("aliases", {}),
        defaults={key: value for key, value in defaults.items() if key in reads},
        default_rope=own.pop("default_rope", {}),
        blocks=Blocks(**own.pop("blocks", {})),
        moe=Moe(**own.pop("moe")) if "moe" in own else None,
        weights={**common["weights"], **own.pop("weights", {})},
        **own,
    )


def _read(name: str) -> dict[str, Any]:
    table = tomllib.loads((FOLDER / f"{name}.toml").read_text("utf-8"))
    return {key: _typed(key, value) for key, value in table.items()}


# What a string or a list of a file becomes. A name that an enum does not have is a ValueError.
TYPES: Mapping[str, Callable[[Any], Any]] = {
    "refused": frozenset,
    "rope_types": frozenset,
    "transposed": frozenset,
    "interleaved": frozenset,
    "norms": Norms,
    "windows": WindowRule,
    "qk_norm": QkNorm,
    "activation": Activation,
}


def _typed(key: str, value: Any) -> Any:
    if isinstance(value, dict) and key in ("blocks", "moe"):
        return {inner: _typed(inner, one) for inner, one in value.items()}
    return TYPES[key](value) if key in TYPES else value
