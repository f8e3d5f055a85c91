"""The rotary embedding that config.json asks for, layer by layer.

It may be written as `rope_theta` and `rope_scaling`, as one `rope_parameters`, or as one of those for each kind of layer.
"""

import math
from collections.abc import Callable, Mapping

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
LAYER_KINDS = ("full_attention", "sliding_attention")


def read_ropes(
    config: Fields,
    head_dim: int,
    *,
    rotates: list[bool],
    has_window: list[bool],
    may_be_partial: bool,
) -> list[RopeSpec]:
    """One for each layer. Raises ArtifactError naming a key that is wrong or not supported.

    `may_be_partial`: whether the architecture knows of heads that are rotated in part.
    """
    if not may_be_partial:
        config.only("partial_rotary_factor", 1, 1.0)
    full, windowed = _tables(config)
    full_rope = _rope(config, full, "rope_theta", head_dim, may_be_partial)
    windowed_rope = full_rope
    if windowed is not None:
        windowed_rope = _rope(config, windowed, "rope_local_base_freq", head_dim, may_be_partial)
    return [
        (windowed_rope if window else full_rope) if rotating else NO_ROTATION
        for rotating, window in zip(rotates, has_window, strict=True)
    ]


def _tables(config: Fields) -> tuple[Fields, Fields | None]:
    """The parameters of layers that see everything, and of windowed ones where those have their own."""
    # With both, transformers takes the older.
    table = config.table("rope_scaling" if config.raw("rope_scaling") else "rope_parameters")
    if "rope_local_base_freq" not in config:
        return table, None
    if any(kind in table for kind in LAYER_KINDS):
        table.only_keys(*LAYER_KINDS)
        return table.table(LAYER_KINDS[0]), table.table(LAYER_KINDS[1])
    return table, Fields(table.file, {})  # the older way: scaling is for full layers alone


def _rope(
    config: Fields, table: Fields, theta_key: str, head_dim: int, may_be_partial: bool
) -> RopeSpec:
    key = "rope_type" if "rope_type" in table else "type"  # its older name
    table.only(key, *SCALINGS)
    kind = table.raw(key) or "default"
    keys, read_scaling = SCALINGS[kind]
    table.only_keys("rope_theta", "rope_type", "type", "partial_rotary_factor", *keys)
    if not may_be_partial:
        table.only("partial_rotary_factor", 1, 1.0)
    theta = table.real("rope_theta", config.real(theta_key, low=LEAST_THETA), low=LEAST_THETA)
    fraction = config.real("partial_rotary_factor", 1.0, high=1.0)
    rotary_dim = int(head_dim * table.real("partial_rotary_factor", fraction, high=1.0))
    if rotary_dim < 2 or rotary_dim % 2:
        raise config.refuse(
            "partial_rotary_factor",
            f"it must leave an even number of the {head_dim} elements of a head, got {rotary_dim}",
        )
    return RopeSpec(theta, rotary_dim, read_scaling(config, table, rotary_dim))


def _unscaled(config: Fields, table: Fields, rotary_dim: int) -> None:
    return None


def _linear(config: Fields, table: Fields, rotary_dim: int) -> Scaling:
    return LinearScaling(table.real("factor"))


def _llama3(config: Fields, table: Fields, rotary_dim: int) -> Scaling:
    scaling = Llama3Scaling(
        factor=table.real("factor"),
        low_freq_factor=table.real("low_freq_factor"),
        high_freq_factor=table.real("high_freq_factor"),
        original_max_position=_original_max_position(config, table),
    )
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise table.refuse("high_freq_factor", "it must be above low_freq_factor")
    return scaling


def _yarn(config: Fields, table: Fields, rotary_dim: int) -> Scaling:
    original = _original_max_position(config, table)
    factor = table.real("factor", config.whole("max_position_embeddings") / original)
    mscale, mscale_all_dim = table.raw("mscale"), table.raw("mscale_all_dim")
    if mscale and mscale_all_dim:
        over = _yarn_attention(factor, table.real("mscale_all_dim"))
        attention_factor = _yarn_attention(factor, table.real("mscale")) / over
    else:
        attention_factor = _yarn_attention(factor, 1.0)
    return YarnScaling(
        factor=factor,
        beta_fast=table.real("beta_fast", 32.0),
        beta_slow=table.real("beta_slow", 1.0),
        truncate=table.flag("truncate", True),
        attention_factor=table.real("attention_factor", attention_factor),
        original_max_position=original,
    )


def _yarn_attention(factor: float, mscale: float) -> float:
    """arXiv:2309.00071, eq. 22, with the exponent that DeepSeek added."""
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0


def _longrope(config: Fields, table: Fields, rotary_dim: int) -> Scaling:
    original = _original_max_position(config, table)
    factor = table.real("factor", config.whole("max_position_embeddings") / original)
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


def _original_max_position(config: Fields, table: Fields) -> int:
    """What the config says outside of the table comes first, as in transformers."""
    within = table.whole(
        "original_max_position_embeddings", config.whole("max_position_embeddings"), low=2
    )
    return config.whole("original_max_position_embeddings", within, low=2)


ORIGINAL = "original_max_position_embeddings"
LONGROPE = ("factor", "short_factor", "long_factor", "attention_factor", ORIGINAL)
YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
# rope_type -> the keys that it may have, and who reads them
SCALINGS: Mapping[str, tuple[tuple[str, ...], Callable[[Fields, Fields, int], Scaling | None]]] = {
    "default": ((ORIGINAL,), _unscaled),
    "linear": (("factor",), _linear),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor", ORIGINAL), _llama3),
    "yarn": (("factor", "attention_factor", ORIGINAL, *YARN), _yarn),
    "longrope": (LONGROPE, _longrope),
    "su": (LONGROPE, _longrope),  # its older name
}
