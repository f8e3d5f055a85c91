"""The rotary embedding that config.json asks for, layer by layer.

It may be written as `rope_theta` and `rope_scaling`, as one `rope_parameters`, or as one of those for each kind of layer.
"""

import math
from collections.abc import Callable, Mapping

from vivace.engine.models.architecture import Architecture
from vivace.engine.models.json_fields import Fields
from vivace.engine.models.spec import (
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    RopeSpec,
    Scaling,
    YarnScaling,
)

LEAST_THETA = 1.001  # at 1 all frequencies are the same
NO_ROTATION = RopeSpec(theta=1.0, rotary_dim=0)
FULL, WINDOWED = "full_attention", "sliding_attention"
THETA, PART = "rope_theta", "partial_rotary_factor"
ORIGINAL = "original_max_position_embeddings"
WINDOWED_THETA = "rope_local_base_freq"


def read_ropes(
    config: Fields,
    architecture: Architecture,
    head_dim: int,
    *,
    rotates: list[bool],
    has_window: list[bool],
) -> list[RopeSpec]:
    """One for each layer. Raises ArtifactError naming a key that is wrong or not supported."""
    full, windowed = _tables(config, architecture)
    max_position = config.whole("max_position_embeddings", low=2)
    full_rope, windowed_rope = (
        _rope(table, architecture, head_dim, max_position=max_position)
        for table in (full, windowed)
    )
    return [
        (windowed_rope if window else full_rope) if rotating else NO_ROTATION
        for rotating, window in zip(rotates, has_window, strict=True)
    ]


def _tables(config: Fields, architecture: Architecture) -> tuple[Fields, Fields]:
    """The parameters of layers that see everything, and of those with a window, completed from the
    keys beside them."""
    scaling, parameters = config.table("rope_scaling"), config.table("rope_parameters")
    if not scaling and "rope_parameters" not in config:
        parameters = parameters.with_defaults(architecture.default_rope)
    part = {PART: config.raw(PART)} if PART in config else {}
    beside = {THETA: config.real(THETA, low=LEAST_THETA), **part}
    original = {ORIGINAL: config.raw(ORIGINAL)} if ORIGINAL in config else {}
    if WINDOWED_THETA not in architecture.reads:
        # With both, transformers takes the older; of the original context, what is said beside.
        table = (scaling or parameters).with_values(original).with_defaults(beside)
        return table, table
    parameters.only_keys(FULL, WINDOWED)
    if scaling and parameters:
        raise config.refuse("rope_scaling", "rope_parameters is there too")
    full, windowed = scaling or parameters.table(FULL), parameters.table(WINDOWED)
    return (
        full.with_defaults(beside),
        windowed.with_defaults({THETA: config.real(WINDOWED_THETA, low=LEAST_THETA), **part}),
    )


def _rope(
    table: Fields, architecture: Architecture, head_dim: int, *, max_position: int
) -> RopeSpec:
    key = "rope_type" if "rope_type" in table else "type"  # its older name
    table.only(key, *sorted(architecture.rope_types))
    keys, read_scaling = SCALINGS[table.raw(key) or "default"]
    table.only_keys("rope_type", "type", THETA, PART, ORIGINAL, *keys)
    if not architecture.partial_rotation:
        table.only(PART, 1, 1.0)
    rotary_dim = int(head_dim * table.real(PART, 1.0, high=1.0))
    if rotary_dim < 2 or rotary_dim % 2:
        raise table.refuse(
            PART,
            f"it must leave an even number of the {head_dim} elements of a head, got {rotary_dim}",
        )
    table = table.with_defaults({ORIGINAL: max_position})
    original = table.whole(ORIGINAL, low=2)
    if "attention_factor" in keys:  # the kinds that take the ratio of the contexts for it
        table = table.with_defaults({"factor": max_position / original})
    scaling = read_scaling(table, original, rotary_dim)
    return RopeSpec(table.real(THETA, low=LEAST_THETA), rotary_dim, scaling)


def _unscaled(table: Fields, original: int, rotary_dim: int) -> None:
    return None


def _linear(table: Fields, original: int, rotary_dim: int) -> Scaling:
    return LinearScaling(table.real("factor"))


def _llama3(table: Fields, original: int, rotary_dim: int) -> Scaling:
    scaling = Llama3Scaling(
        factor=table.real("factor"),
        low_freq_factor=table.real("low_freq_factor"),
        high_freq_factor=table.real("high_freq_factor"),
        original_max_position=original,
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise table.refuse("high_freq_factor", "it must be above low_freq_factor")
    return scaling


def _yarn(table: Fields, original: int, rotary_dim: int) -> Scaling:
    factor = table.real("factor")
    if table.raw("mscale") and table.raw("mscale_all_dim"):
        over = _yarn_attention(factor, table.real("mscale_all_dim"))
        attention_factor = _yarn_attention(factor, table.real("mscale")) / over
    else:
        attention_factor = _yarn_attention(factor, 1.0)
    return YarnScaling(
        factor=factor,
        beta_fast=table.real("beta_fast", 32.0),
        beta_slow=table.real("beta_slow", 1.0),
        truncate=table.flag("truncate", not table.says("truncate")),  # null is false
        attention_factor=table.real("attention_factor", attention_factor),
        original_max_position=original,
    )


def _yarn_attention(factor: float, mscale: float) -> float:
    """arXiv:2309.00071, eq. 22, with the exponent that DeepSeek added."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _longrope(table: Fields, original: int, rotary_dim: int) -> Scaling:
    factor = table.real("factor")
    attention_factor = 1.0
    if factor > 1:
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    return LongRopeScaling(
        short_factor=_factors(table, "short_factor", rotary_dim // 2),
        long_factor=_factors(table, "long_factor", rotary_dim // 2),
        attention_factor=table.real("attention_factor", attention_factor),
        original_max_position=original,
    )


def _factors(table: Fields, key: str, count: int) -> tuple[float, ...]:
    factors = tuple(table.real_list(key))
    if len(factors) != count:
        raise table.refuse(key, f"it must hold {count} numbers, one for each frequency")
    return factors


LONGROPE = ("factor", "short_factor", "long_factor", "attention_factor")
YARN = ("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
# rope_type -> the keys that it may have, and who reads them
SCALINGS: Mapping[str, tuple[tuple[str, ...], Callable[[Fields, int, int], Scaling | None]]] = {
    "default": ((), _unscaled),
    "linear": (("factor",), _linear),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), _llama3),
    "yarn": ((*YARN, "truncate"), _yarn),
    "longrope": (LONGROPE, _longrope),
    "su": (LONGROPE, _longrope),  # its older name
}
