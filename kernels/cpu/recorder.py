"""Ops noted down, and run again by the library in one call with the GIL released.

An op's arguments are a packed struct of pointers and numbers. Recorded at several sizes of a step, the structs must be the
same but for int64 fields that are constant + factor * size, and say so at sizes that they were not derived from.
Never trusts a struct: what varies in another way is refused.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from operator import mul

import numpy as np

from vivace.kernels.cpu.library import Array, Library, Recorded, pointer

CallOps = Callable[[Sequence[int]], None]

ALIGNMENT = 8  # of each struct in the program


@dataclass(frozen=True, slots=True)
class Patch:
    """A field that varies: constant + factor * size, over all sizes."""

    call: int
    offset: int  # in the call's struct
    constant: int
    factors: tuple[int, ...]


class _Recording(ctypes.Structure):
    """`cpu::Recording` of kernels/cpu/program.h."""

    _pack_ = 1
    _fields_ = (
        ("num_calls", ctypes.c_int64),
        ("num_bytes", ctypes.c_int64),
        ("num_patches", ctypes.c_int64),
        ("num_sizes", ctypes.c_int64),
        ("ops", ctypes.c_void_p),
        ("starts", ctypes.c_void_p),
        ("args", ctypes.c_void_p),
        ("patches", ctypes.c_void_p),
    )


class CpuReplay:
    """See `kernels.recorder.Replay`. Owns the library's copy of the structs."""

    def __init__(
        self,
        library: Library,
        calls: Sequence[Recorded],
        patches: Sequence[Patch],
        *,
        num_sizes: int,
    ) -> None:
        self._library = library
        self._names = [call.name for call in calls]
        structs = [bytes(call.args) for call in calls]
        sizes = [-(-len(struct) // ALIGNMENT) * ALIGNMENT for struct in structs]
        starts = np.cumsum([0, *sizes], dtype=np.int64)
        padded = (one.ljust(size, b"\0") for one, size in zip(structs, sizes, strict=True))
        args = np.frombuffer(b"".join(padded), np.uint8)
        ops = np.array([call.address for call in calls], np.uintp)
        rows = [(starts[one.call] + one.offset, one.constant, *one.factors) for one in patches]
        places = np.array(rows, np.int64).reshape(-1, 2 + num_sizes)
        counts = (len(calls), len(args), len(patches), num_sizes)
        arrays: tuple[Array, ...] = (ops, starts, args, places)
        recording = _Recording(*counts, *map(pointer, arrays))
        self._sizes = np.zeros(num_sizes, np.int64)
        self._program = library.make_program(recording, self)

    def run(self, sizes: Sequence[int], then: Callable[[], None] | None = None) -> None:
        """See `kernels.recorder.Replay`."""
        self._sizes[:] = sizes
        more = () if then is None else self._library.record(then)
        self._library.run_program(self._program, self._sizes, more)

    def profile(
        self, sizes: Sequence[int], then: Callable[[], None] | None = None
    ) -> list[tuple[str, float]]:
        """See `kernels.recorder.Replay`."""
        self._sizes[:] = sizes
        more = () if then is None else self._library.record(then)
        names = [*self._names, *(call.name for call in more)]
        seconds = np.zeros(len(names))
        self._library.run_program(self._program, self._sizes, more, seconds)
        return list(zip(names, seconds.tolist(), strict=True))


class CpuRecorder:
    """See `kernels.recorder.Recorder`."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def record(self, call_ops: CallOps, most: Sequence[int]) -> CpuReplay:
        """See `kernels.recorder.Recorder`."""
        origin = [0] * len(most)
        axes = [[*origin[:i], size, *origin[i + 1 :]] for i, size in enumerate(most)]
        # Off every line between those: a product of sizes, a square or a rounded quotient shows here.
        further = [size - size // 3 for size in most]
        points = [origin, *axes, further]
        recordings = [self._library.record(partial(call_ops, point)) for point in points]
        names = [[call.name for call in calls] for calls in recordings]
        if any(one != names[0] for one in names):
            raise ValueError("other ops, or another order, at other sizes")
        patches = [
            patch
            for i, calls in enumerate(zip(*recordings, strict=True))
            for patch in _patches(i, calls, points)
        ]
        return CpuReplay(self._library, recordings[0], patches, num_sizes=len(most))


def _patches(
    number: int, calls: Sequence[Recorded], points: Sequence[Sequence[int]]
) -> list[Patch]:
    """What varies of one call, recorded at the origin, on each axis and at a further point."""
    found = []
    kind = type(calls[0].args)
    for name, field, *_ in kind._fields_:
        values = [getattr(call.args, name) for call in calls]
        if values.count(values[0]) == len(values):
            continue
        constant, *on_axes, further = values
        most = [max(axis) for axis in points[1:-1]]
        steps = [value - constant for value in on_axes]
        factors = [step // max(1, size) for step, size in zip(steps, most, strict=True)]
        fits = [factor * size for factor, size in zip(factors, most, strict=True)] == steps
        expected = constant + sum(map(mul, factors, points[-1]))
        if field is not ctypes.c_int64 or not fits or further != expected:
            at = ", ".join(
                f"{value} at {point}" for value, point in zip(values, points, strict=True)
            )
            raise ValueError(
                f"{name} of {calls[0].name} must be constant + factor * size, got {at}"
            )
        found.append(Patch(number, getattr(kind, name).offset, constant, tuple(factors)))
    return found
