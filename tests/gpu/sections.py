"""The check's sections: what each is made of, how many processes share its parts, and how long one part may take."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

from tests.gpu import (
    anchor_attention,
    anchor_rows,
    anchor_sparse,
    conformance,
    generation,
    load_attention,
    load_moe,
    load_sampling,
    parity,
    peers,
)
from tests.gpu.ceilings import CEILINGS
from tests.gpu.setting import Part


@dataclass(frozen=True)
class Section:
    """Parts by name. Those of sections with `is_alone` have the device to themselves, one after another."""

    parts: Callable[[], Mapping[str, Part]]
    num_workers: int
    part_limit_s: float
    limit_s: float = (
        220  # of the section; what is left then fails, and what is timed still has its time
    )
    is_alone: bool = False
    is_ours: bool = True  # whether a part that breaks or hangs is a failure
    is_sanitized: bool = False  # under the memory checker, or not at all


def anchors() -> Mapping[str, Part]:
    """What must hold to the last bit."""
    return {**anchor_attention.parts(), **anchor_sparse.parts(), **anchor_rows.parts()}


def bars() -> Mapping[str, Part]:
    """Our ops at the shapes that they are judged by."""
    found: dict[str, Part] = {}
    for shape in load_attention.DECODE:
        found[f"decode, {shape.name}"] = partial(load_attention.decode, shape=shape)
    for shape in load_attention.PREFILL:
        found[f"prefill, {shape.name}"] = partial(load_attention.prefill, shape=shape)
    for shape in load_attention.SPARSE:
        found[f"sparse, {shape.name}"] = partial(load_attention.sparse, shape=shape)
    for T in load_moe.ROWS:
        found[f"moe, {T} tokens"] = partial(load_moe.moe, T=T)
    for kind in load_sampling.KINDS:
        found[f"sampling, {kind.name}"] = partial(load_sampling.sampling, kind=kind)
    return found


# In this order: first what must be right, together; then what is timed, alone.
SECTIONS: Mapping[str, Section] = {
    "conformance": Section(conformance.parts, 6, 60),
    "anchors": Section(anchors, 3, 60),
    "models": Section(generation.parts, 7, 120),
    "parity": Section(parity.parts, 1, 60),
    "memcheck": Section(conformance.small_parts, 1, 60, is_sanitized=True),
    "ceilings": Section(lambda: CEILINGS, 1, 30, is_alone=True),
    "bars": Section(bars, 1, 60, is_alone=True),
    "peers": Section(peers.parts, 1, 60, is_alone=True, is_ours=False),
    "northstar": Section(generation.northstar_parts, 1, 60, is_alone=True),
}
