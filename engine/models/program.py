"""A model's step as data: which ops run on which values. Nothing here computes.

Shapes are written in the symbols of a step, so one program serves every step: no branch in it, and
none in whoever runs it, depends on how many tokens there are.
"""

from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from math import prod
from typing import Any

import numpy as np

from vivace.kernels.buffer import DType
from vivace.kernels.quantized import packed_bytes


class Symbol(Enum):
    """Sizes that differ from step to step."""

    T = "tokens"
    B = "requests"
    B1 = "requests + 1"
    P = "rows that pass the last layer"
    R = "rows of logits"
    X = "columns of the block table"


Size = int | Symbol
Attr = float | int | str
Array = np.ndarray[Any, np.dtype[np.float32]]
Sizes = Mapping[Symbol, int]


class Kind(Enum):
    """Where a value's memory comes from."""

    WEIGHT = "weight"  # by name, from the checkpoint
    CONSTANT = "constant"  # numbers that follow from the spec; they travel with the program
    INPUT = "input"  # filled from the Batch
    CACHE = "cache"  # the KV blocks of one layer; shape (G, D)
    COUNTER = "counter"  # int64, zero at first; ops add to it
    ACTIVATION = "activation"  # a slot of the arena, reused after its last use


@dataclass(frozen=True, slots=True)
class Value:
    """A named array of the program."""

    name: str
    kind: Kind
    shape: tuple[Size, ...]
    dtype: DType
    # Of a weight: the rows of each checkpoint tensor it is joined from, if there is more than one.
    parts: tuple[int, ...] = ()
    plus: float = 0.0  # of a weight: added to what the checkpoint holds
    group: int | None = None  # of an int4 weight: inputs that share a scale
    # The same memory as this activation under another shape, or its leading rows.
    of: "Value | None" = None

    @property
    def is_quantized(self) -> bool:
        """Whether it is small whole numbers with scales."""
        return self.dtype in (DType.INT8, DType.INT4)

    @property
    def owner(self) -> "Value":
        """The value whose memory this is."""
        return self if self.of is None else self.of


@dataclass(frozen=True, slots=True)
class Call:
    """One op: writes `outs` whole (a cache: in part), reads `ins`; `attrs` are constants of the
    model."""

    op: str  # a field of `kernels.backend.Ops`
    outs: tuple[Value, ...]
    ins: tuple[Value, ...]
    attrs: tuple[tuple[str, Attr], ...] = ()


@dataclass(frozen=True, slots=True)
class Program:
    """Calls in order, and the values that hold the results after the last."""

    calls: tuple[Call, ...]
    hidden: Value  # [P, M], after the final norm
    logits: Value  # [R, V], of its first R rows
    constants: dict[Value, Array] = field(default_factory=dict)


def values_of(program: Program) -> list[Value]:
    """Every value that a call touches, each once, in the order of first use."""
    return list(dict.fromkeys(v for call in program.calls for v in (*call.outs, *call.ins)))


def weight_bytes(value: Value) -> int:
    """Bytes of a weight as it is kept."""
    shape = sized(value.shape, {})
    if value.is_quantized:
        return packed_bytes(shape, value.group)
    return (2 if value.dtype is DType.BF16 else 4) * prod(shape)


def num_experts(weight: Value) -> int:
    """Matrices that a weight holds: one for each expert, else one."""
    return prod(sized(weight.shape[:-2], {}))


def sized(shape: tuple[Size, ...], sizes: Sizes) -> tuple[int, ...]:
    """A shape with its symbols filled in."""
    return tuple(sizes[size] if isinstance(size, Symbol) else size for size in shape)


def assign_slots(program: Program, most: Sizes) -> dict[Value, int]:
    """Give each activation a slot of the arena such that no two live at once share one: the largest of a step of these sizes
    first, each the first slot that is free while it lives (arXiv:2001.03288, greedy by size).

    A slot holds one element type. Views of an activation are not in the result: they lie where
    their owner does.
    """
    born: dict[Value, int] = {}
    last: dict[Value, int] = {}
    for i, call in enumerate(program.calls):
        for value in (v.owner for v in (*call.outs, *call.ins)):
            if value.kind is Kind.ACTIVATION:
                born.setdefault(value, i)
                last[value] = i
    last |= dict.fromkeys((program.hidden.owner, program.logits.owner), len(program.calls))
    slots: dict[Value, int] = {}
    taken: list[tuple[DType, list[tuple[int, int]]]] = []  # of each slot, the lives in their order
    for value in sorted(born, key=lambda one: -prod(sized(one.shape, most))):
        life = born[value], last[value]
        for slot, (dtype, lives) in enumerate(taken):
            at = bisect(lives, life)
            is_free = all(end < life[0] for _, end in lives[max(at - 1, 0) : at])
            is_free = is_free and all(life[1] < start for start, _ in lives[at : at + 1])
            if dtype is value.dtype and is_free:
                lives.insert(at, life)
                slots[value] = slot
                break
        else:
            slots[value] = len(taken)
            taken.append((value.dtype, [life]))
    return slots
