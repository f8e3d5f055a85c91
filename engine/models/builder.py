"""What emitters write programs with. One emitter per kind of block; none knows the whole model."""

from typing import Any

import numpy as np

from vivace.engine.models.program import Attr, Call, Kind, Program, Size, Value
from vivace.kernels.buffer import DType

Array = np.ndarray[Any, np.dtype[np.float32]]


class Builder:
    """Collects calls. Lives while a model is loaded, then is gone."""

    def __init__(self, cache_dtype: DType = DType.FP32) -> None:
        self._cache_dtype = cache_dtype
        self._calls: list[Call] = []
        self._constants: dict[Value, Array] = {}
        self._num_values = 0

    def weight(
        self, name: str, *shape: int, parts: tuple[int, ...] = (), plus: float = 0.0
    ) -> Value:
        """Name a weight; the loader finds it in the checkpoint, or says that it is missing.

        `parts`: the rows of each tensor it is joined from, if there is more than one. `plus` is
        added to what the checkpoint holds.
        """
        return Value(name, Kind.WEIGHT, shape, DType.FP32, parts=parts, plus=plus)

    def constant(self, name: str, numbers: Array) -> Value:
        """An fp32 array that follows from the spec."""
        value = Value(name, Kind.CONSTANT, numbers.shape, DType.FP32)
        self._constants[value] = numbers
        return value

    def input(self, name: str, *shape: Size) -> Value:
        """An int32 array that every step brings."""
        return Value(name, Kind.INPUT, shape, DType.INT32)

    def cache(self, name: str, num_kv_heads: int, head_dim: int) -> Value:
        """The KV blocks of one layer."""
        return Value(name, Kind.CACHE, (num_kv_heads, head_dim), self._cache_dtype)

    def counter(self, name: str, *shape: int) -> Value:
        """Numbers that steps add to, zero at first."""
        return Value(name, Kind.COUNTER, shape, DType.INT64)

    def activation(self, op: str, *shape: Size, dtype: DType = DType.FP32) -> Value:
        """A fresh result for a call to `op`."""
        self._num_values += 1
        return Value(f"{op}_{self._num_values}", Kind.ACTIVATION, shape, dtype)

    def view(self, value: Value, *shape: Size) -> Value:
        """The same elements under another shape, or the leading ones; the caller sees to it that
        there are as many."""
        return Value(f"{value.name}_view", Kind.ACTIVATION, shape, value.dtype, of=value.owner)

    def call(
        self,
        op: str,
        outs: tuple[Value, ...],
        ins: tuple[Value, ...],
        attrs: tuple[tuple[str, Attr], ...] = (),
    ) -> None:
        """Append an op."""
        self._calls.append(Call(op, outs, ins, attrs))

    def linear(self, x_TK: Value, weight_NK: Value, bias_N: Value | None = None) -> Value:
        """Append x W^T + bias."""
        out_TN = self.activation("linear", x_TK.shape[0], weight_NK.shape[0])
        bias = () if bias_N is None else (bias_N,)
        self.call("linear", (out_TN,), (x_TK, weight_NK, *bias))
        return out_TN

    def take_rows(self, x_TM: Value, rows_P: Value) -> Value:
        """Append the choice of the rows that pass the last layer."""
        out_PM = self.activation("take_rows", rows_P.shape[0], x_TM.shape[1])
        self.call("take_rows", (out_PM,), (x_TM, rows_P))
        return out_PM

    def finish(self, hidden: Value, logits: Value) -> Program:
        """Close the program."""
        return Program(tuple(self._calls), hidden, logits, dict(self._constants))
