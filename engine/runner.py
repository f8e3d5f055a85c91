"""Batch to logits and hidden states: binds a `Program` to buffers and runs its calls in order.
Decides nothing; imports no torch.

The plain loop calls op by op. With a backend's recorder, the ops are noted down once, when the
model is loaded, and every step is one call; it must give what the loop gives.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from math import prod
from operator import itemgetter
from typing import Any

import numpy as np

from vivace.engine.models.program import (
    Kind,
    Program,
    Sizes,
    Symbol,
    Value,
    assign_slots,
    sized,
    values_of,
)
from vivace.kernels.backend import Ops
from vivace.kernels.buffer import Buffer, DType

Array = np.ndarray[Any, Any]

BYTES = {
    DType.FP32: 4,
    DType.FP16: 2,
    DType.BF16: 2,
    DType.UINT8: 1,
    DType.INT32: 4,
    DType.INT64: 8,
}
SIZES = (Symbol.T, Symbol.B, Symbol.P, Symbol.R)  # of a replay; the others follow or are fixed
MAX_BOUND = 256  # sizes whose views are kept: decode steps come back to the same few


def arena_bytes(program: Program, most: Sizes) -> int:
    """Bytes of all activations of the largest step."""
    return sum(count * BYTES[dtype] for count, dtype in _slot_sizes(program, most))


class Runner:
    """Owns the arena, the caches and the uploaded weights. Not thread-safe: the engine loop is its
    only caller.

    Steps are replayed if the backend has a recorder; `replace(ops, recorder=None)` is the loop.
    """

    def __init__(
        self,
        program: Program,
        ops: Ops,
        weights: Mapping[str, Any],  # arrays; of quantized ones, what `Memory.pack` made
        *,
        most: Sizes,
        num_blocks: int,
        block_tokens: int,
    ) -> None:
        self.ops = ops
        self.caches: dict[str, Buffer] = {}  # by name; `kv_read` and `rope_kv_write` are the doors
        self.counters: dict[str, Buffer] = {}  # by name, in the order of the layers
        self._most = dict(most)
        self._arena = [
            ops.memory.empty((count,), dtype) for count, dtype in _slot_sizes(program, most)
        ]
        self._slots = assign_slots(program, most)
        values = list(dict.fromkeys((*values_of(program), program.hidden, program.logits)))
        places = {value: i for i, value in enumerate(values)}
        self._fixed: list[Buffer | None] = [None] * len(values)
        for value, i in places.items():
            if value.kind is Kind.WEIGHT:
                weight = weights[value.name]
                self._fixed[i] = weight if value.is_quantized else ops.memory.upload(weight)
            elif value.kind is Kind.CONSTANT:
                self._fixed[i] = ops.memory.upload(program.constants[value])
            elif value.kind is Kind.CACHE:
                G, D = sized(value.shape, {})
                cache = ops.memory.kv_cache(num_blocks, block_tokens, G, D, value.dtype)
                self._fixed[i] = self.caches[value.name] = cache
            elif value.kind is Kind.COUNTER:
                zeros = np.zeros(sized(value.shape, {}), np.int64)
                self._fixed[i] = self.counters[value.name] = ops.memory.upload(zeros)
        self._inputs = [(value, i) for value, i in places.items() if value.kind is Kind.INPUT]
        self._activations = [
            (value, i) for value, i in places.items() if value.kind is Kind.ACTIVATION
        ]
        self._results = program.logits, program.hidden
        self._calls: list[tuple[Callable[..., None], Callable[[Any], Any], dict[str, Any]]] = [
            (
                getattr(ops, call.op),
                itemgetter(*(places[value] for value in (*call.outs, *call.ins))),
                dict(call.attrs),
            )
            for call in program.calls
        ]
        self._varying = sorted(
            {size for v, _ in self._activations for size in v.shape if isinstance(size, Symbol)},
            key=lambda symbol: symbol.name,
        )
        self._bound: dict[tuple[int, ...], list[Buffer | None]] = {}
        # Where a replay reads the inputs: a block table of all columns, though a step fills few.
        self._staged: dict[str, Array] = {}
        self._replay = None
        if ops.recorder is not None:
            for value, _ in self._inputs:
                assert value.dtype is DType.INT32
                self._staged[value.name] = np.zeros(sized(value.shape, self._most), np.int32)
            limits = {**self._most, Symbol.R: min(most[Symbol.R], most[Symbol.P])}
            self._replay = ops.recorder.record(self._call_staged, [limits[size] for size in SIZES])
            self._bound.clear()

    def step(
        self,
        inputs: Mapping[str, Array],
        num_logits: int | None = None,
        then: Callable[[Buffer], None] | None = None,
    ) -> tuple[Buffer, Buffer]:
        """Return logits [R, V] of the first `num_logits` of the rows asked for, None for all, and
        the final hidden state [P, M] of all, both valid until the next step.

        `then` calls further ops on the logits, which run with the step; it must not read a buffer.
        Raises ValueError if the inputs do not fit.
        """
        sizes = self._sizes(inputs, num_logits)
        if self._replay is None:
            logits, hidden = self._loop(inputs, sizes)
            if then is not None:
                then(logits)
            return logits, hidden
        for name, staged in self._staged.items():
            array = inputs[name]
            if array.dtype != staged.dtype:
                raise ValueError(f"{name} must hold {staged.dtype}, got {array.dtype}")
            staged[tuple(map(slice, array.shape))] = array
        logits, hidden = (self._view(value, sizes) for value in self._results)
        self._replay.run(
            [sizes[symbol] for symbol in SIZES], None if then is None else partial(then, logits)
        )
        return logits, hidden

    def counted(self) -> list[Array]:
        """Every counter's numbers so far, copied; waits for the device."""
        return [np.array(self.ops.memory.read(counter)) for counter in self.counters.values()]

    def _loop(self, inputs: Mapping[str, Array], sizes: Sizes) -> tuple[Buffer, Buffer]:
        """Every op called in its turn."""
        upload = self.ops.memory.upload
        arrays = (upload(np.ascontiguousarray(inputs[value.name])) for value, _ in self._inputs)
        self._call(sizes, arrays)
        logits, hidden = (self._view(value, sizes) for value in self._results)
        return logits, hidden

    def _call_staged(self, values: Sequence[int]) -> None:
        """Every op called on the staged inputs of a step of these `SIZES`."""
        sizes = dict(zip(SIZES, values, strict=True))
        sizes |= {Symbol.B1: sizes[Symbol.B] + 1, Symbol.X: self._most[Symbol.X]}
        memory = self.ops.memory
        staged = (
            memory.view(
                memory.upload(self._staged[value.name].reshape(-1)), sized(value.shape, sizes)
            )
            for value, _ in self._inputs
        )
        self._call(sizes, staged)

    def _call(self, sizes: Sizes, inputs: Iterable[Buffer]) -> None:
        buffers = self._bind(sizes)
        for (_, i), buffer in zip(self._inputs, inputs, strict=True):
            buffers[i] = buffer
        for run, pick, attrs in self._calls:
            run(*pick(buffers), **attrs)

    def _sizes(self, inputs: Mapping[str, Array], num_logits: int | None) -> dict[Symbol, int]:
        """The symbols' values, from the shapes of the inputs; the rows of logits have none."""
        sizes: dict[Symbol, int] = {}
        for value, _ in self._inputs:
            shape = inputs[value.name].shape
            if len(shape) != len(value.shape):
                raise ValueError(
                    f"{value.name} must have {len(value.shape)} dimensions, got {list(shape)}"
                )
            for symbol, size in zip(value.shape, shape, strict=True):
                assert isinstance(symbol, Symbol)  # inputs have no constant in their shape
                if sizes.setdefault(symbol, size) != size:
                    raise ValueError(
                        f"{value.name} {list(shape)}: {symbol.value} are {sizes[symbol]} elsewhere"
                    )
        if sizes[Symbol.B1] != sizes[Symbol.B] + 1:
            raise ValueError(
                f"query_starts must be [{sizes[Symbol.B] + 1}], got [{sizes[Symbol.B1]}]"
            )
        num_rows = sizes[Symbol.P]
        sizes[Symbol.R] = num_rows if num_logits is None else num_logits
        if not 0 <= sizes[Symbol.R] <= num_rows:
            raise ValueError(f"num_logits must be in 0..{num_rows}, the rows, got {num_logits}")
        for symbol, size in sizes.items():
            if size > self._most[symbol]:
                raise ValueError(f"{symbol.value}: {size} in a step, at most {self._most[symbol]}")
        return sizes

    def _bind(self, sizes: Sizes) -> list[Buffer | None]:
        """Every buffer of a step of these sizes, the inputs still to be filled in."""
        key = tuple(sizes[symbol] for symbol in self._varying)
        bound = self._bound.get(key)
        if bound is None:
            if len(self._bound) >= MAX_BOUND:
                del self._bound[next(iter(self._bound))]  # the oldest
            bound = self._bound[key] = list(self._fixed)
            for value, i in self._activations:
                bound[i] = self._view(value, sizes)
        return bound

    def _view(self, value: Value, sizes: Sizes) -> Buffer:
        """An activation, where it lies."""
        slot = self._arena[self._slots[value.owner]]
        return self.ops.memory.view(slot, sized(value.shape, sizes))


def _slot_sizes(program: Program, most: Sizes) -> list[tuple[int, DType]]:
    """Elements and type of each slot of the arena."""
    slots = assign_slots(program, most)
    counts: dict[int, tuple[int, DType]] = {}
    for value, slot in slots.items():
        count = max(prod(sized(value.shape, most)), counts.get(slot, (0, value.dtype))[0])
        counts[slot] = (count, value.dtype)
    return [counts[slot] for slot in range(len(counts))]
