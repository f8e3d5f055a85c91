"""A program with quantized weights in place of its own: activations become bytes, row by row, before each projection.

Projections are rewritten, those of experts too, and the embedding. The output layer is int8 whatever the rest is: it decides
between tokens directly. Routers and gates of experts stay as they are, since a small error there sends a token elsewhere.
"""

from collections import Counter
from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

import numpy as np

from vivace.engine.models.program import Attr, Call, Kind, Program, Value
from vivace.kernels import quantized
from vivace.kernels.buffer import DType
from vivace.kernels.memory import Memory

Array = np.ndarray[Any, Any]

GATES = (".moe.router", ".shared.gate")
MAKERS = ("rmsnorm", "add_rmsnorm", "gated")  # with a twin each, whose last result is bytes at once


class Quantize(Enum):
    """What weights become when they are loaded."""

    NONE = "none"
    INT8 = "int8"  # a scale for each output
    INT4 = "int4"  # a scale for each group of inputs


def quantize(program: Program, kind: Quantize, group: int) -> Program:
    """The program in `kind`. Its results have the names and shapes that they had."""
    if kind is Quantize.NONE:
        return program
    return _Rewrite(kind, group).program(program)


def place(memory: Memory, value: Value, array: Array) -> Any:
    """A weight as the runner takes it."""
    match value.dtype:
        case DType.INT8:
            return memory.pack(quantized.quantize_int8(array))
        case DType.INT4:
            assert value.group is not None
            return memory.pack(quantized.quantize_int4(array, value.group))
    return array


@dataclass(frozen=True, slots=True)
class _Rows:
    """A value as bytes."""

    q: Value
    params: Value


class _Rewrite:
    """Of one program, once."""

    def __init__(self, kind: Quantize, group: int) -> None:
        self._kind = kind
        self._group = group
        self._calls: list[Call] = []
        self._rows: dict[Value, _Rows] = {}

    def program(self, program: Program) -> Program:
        """With every call that can be replaced."""
        for call in program.calls:
            match call.op:
                case "linear" if self._takes(call.ins[1]):
                    self._linear(call, is_output=program.logits.owner in _results(program, call))
                case "expert_linear" if self._takes(call.ins[2]):
                    self._expert_linear(call)
                case "embed":
                    self._call("embed_int8", call, (call.ins[0], _int8(call.ins[1])))
                case _:
                    self._calls.append(call)
        kept = {program.hidden.owner, program.logits.owner}
        return replace(program, calls=_joined(self._calls, kept))

    def _takes(self, weight: Value) -> bool:
        K = weight.shape[-1]
        assert isinstance(K, int)
        is_gate = weight.name.endswith(GATES)
        return weight.kind is Kind.WEIGHT and not is_gate and K <= quantized.MAX_INPUTS

    def _linear(self, call: Call, *, is_output: bool) -> None:
        x, weight, *bias = call.ins
        rows = self._quantized(x)
        small = _int8(weight) if is_output else self._small(weight)
        self._call(f"linear_{small.dtype.value}", call, (rows.q, rows.params, small, *bias))

    def _expert_linear(self, call: Call) -> None:
        x, experts, weight, *bias = call.ins
        rows = self._quantized(x)
        small = self._small(weight)
        ins = (rows.q, rows.params, experts, small, *bias)
        self._call(f"expert_linear_{small.dtype.value}", call, ins)

    def _small(self, weight: Value) -> Value:
        """As most are kept."""
        if self._kind is Quantize.INT8:
            return _int8(weight)
        return replace(weight, dtype=DType.INT4, group=self._group)

    def _call(self, op: str, call: Call, ins: tuple[Value, ...]) -> None:
        attrs: tuple[tuple[str, Attr], ...] = call.attrs
        self._calls.append(Call(op, call.outs, ins, attrs))

    def _quantized(self, x: Value) -> _Rows:
        """Once for all that read it."""
        if x not in self._rows:
            q = Value(f"{x.name}.q", Kind.ACTIVATION, x.shape, DType.UINT8)
            params = Value(f"{x.name}.params", Kind.ACTIVATION, (*x.shape[:-1], 2), DType.FP32)
            self._rows[x] = _Rows(q, params)
            self._calls.append(Call("quantize", (q, params), (x,)))
        return self._rows[x]


def _joined(calls: Sequence[Call], kept: Container[Value]) -> tuple[Call, ...]:
    """Whoever makes what is read as bytes alone makes these at once. `kept`: what is read after the last call, too."""
    readers = Counter(value.owner for call in calls for value in call.ins)
    roundings = {
        call.ins[0]: call
        for call in calls
        if call.op == "quantize"
        and readers[call.ins[0].owner] == 1
        and call.ins[0].owner not in kept
    }
    makers = {call.outs[-1] for call in calls if call.op in MAKERS} & roundings.keys()
    found: list[Call] = []
    for call in calls:
        if call.op in MAKERS and call.outs[-1] in makers:
            outs = (*call.outs[:-1], *roundings[call.outs[-1]].outs)
            found.append(Call(f"{call.op}_quantize", outs, call.ins, call.attrs))
        elif call.op != "quantize" or call.ins[0] not in makers:
            found.append(call)
    return tuple(found)


def _results(program: Program, call: Call) -> set[Value]:
    """What the call's result becomes where nothing but a softcap is between: itself, and the capped."""
    results = set(call.outs)
    for later in program.calls:
        if later.op == "softcap" and later.ins[0] in results:
            results |= set(later.outs)
    return results


def _int8(weight: Value) -> Value:
    return replace(weight, dtype=DType.INT8)
