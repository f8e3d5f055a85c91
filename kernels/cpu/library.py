"""The C++ library: loaded, checked against this package, and given a thread pool. Decides nothing after that."""

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vivace.kernels.quantized import Quantized

ABI = 7
PATH = Path(__file__).parents[1] / "libvivace_cpu.so"

Array = np.ndarray[Any, Any]


def pointer(array: Array) -> int:
    """The address of a dense array. Raises ValueError for one with gaps, which the library could not know of."""
    if not array.flags.c_contiguous:
        raise ValueError(f"array {list(array.shape)} with strides {array.strides} is not dense")
    address: int = array.__array_interface__["data"][0]
    return address


def optional_pointer(array: Array | None) -> int | None:
    """The address of a dense array, null for none."""
    return None if array is None else pointer(array)


def kv_type(cache: Array) -> int:
    """The library's number of a cache's element type: `cpu::KvType` of kernels/cpu/kv.h."""
    return ("float32", "uint16", "int8").index(cache.dtype.name)


_Number = ctypes.c_int32 | ctypes.c_int64 | ctypes.c_double


@dataclass(frozen=True, slots=True)
class Recorded:
    """A call of an op that was noted down instead of run."""

    name: str
    address: int  # of the library's function
    args: ctypes.Structure


class _Call(ctypes.Structure):
    """`cpu::Call` of kernels/cpu/program.h."""

    _pack_ = 1
    _fields_ = (("op", ctypes.c_void_p), ("args", ctypes.c_void_p))


def is_bf16(array: Array) -> bool:
    """Whether an array of weights holds bf16, as the bits of uint16."""
    return bool(array.dtype == np.uint16)


class Library:
    """One context of the library: an instruction set and a thread pool of its own, freed with this object."""

    def __init__(self, *, threads: int, isa: str | None = None, path: Path = PATH) -> None:
        try:
            self._library = ctypes.CDLL(str(path))
        except OSError as error:
            raise ImportError(
                f"cannot load {path.name} ({error}); build it: pip install -e . in the repository"
            ) from error
        if self._library.vivace_abi() != ABI:
            raise ImportError(
                f"{path.name} has ABI {self._library.vivace_abi()}, this package needs {ABI}: rebuild it"
            )
        if threads < 1:
            raise ValueError(f"threads must be at least 1, got {threads}")
        self._library.vivace_isa_name.restype = ctypes.c_char_p
        create = self._library.vivace_context_create
        create.restype, create.argtypes = ctypes.c_void_p, (ctypes.c_int32, ctypes.c_int32)
        destroy = self._library.vivace_context_destroy
        destroy.restype, destroy.argtypes = None, (ctypes.c_void_p,)
        there = self.isas()
        self.isa = list(there)[-1] if isa is None else isa
        if self.isa not in there:
            raise ValueError(f"isa must be one of {', '.join(there)} on this CPU, got {isa!r}")
        self._number, self._threads = there[self.isa], threads
        self._context = create(self._number, threads)
        if self._context is None:
            raise MemoryError(f"no context with {threads} threads")
        weakref.finalize(self, destroy, self._context)
        self._progress = self._library.vivace_context_progress
        self._progress.restype, self._progress.argtypes = ctypes.c_int64, (ctypes.c_void_p,)
        self._recorded: list[Recorded] | None = None  # while ops are noted down instead of run

    def progress(self) -> int:
        """How many ops have finished. Any thread may ask."""
        count: int = self._progress(self._context)
        return count

    def op(self, name: str, args: type[ctypes.Structure]) -> Callable[[ctypes.Structure], None]:
        """The function of an op. Raises ImportError if the library's struct is another than `args`.

        The library waits for its threads with the GIL released.
        """
        size = getattr(self._library, f"vivace_{name}_size")
        size.restype = ctypes.c_int64
        if size() != ctypes.sizeof(args):
            raise ImportError(
                f"arguments of {name}: {size()} bytes in {PATH.name}, "
                f"{ctypes.sizeof(args)} in this package: rebuild it"
            )
        function = getattr(self._library, f"vivace_{name}")
        function.restype, function.argtypes = None, (ctypes.c_void_p, ctypes.c_void_p)
        byref = ctypes.byref
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None

        def call(arguments: ctypes.Structure) -> None:
            if self._recorded is None:
                function(self._context, byref(arguments))
            else:
                self._recorded.append(Recorded(name, address, arguments))

        return call

    def probe(
        self,
        name: str,
        repeats: int,
        what: Sequence[_Number],
        amount: Sequence[_Number],
    ) -> list[float] | None:
        """The rates that a probe of kernels/cpu/probe.h finds; None if it cannot run here."""
        rates = np.zeros(repeats)
        isa, threads, count = map(ctypes.c_int32, (self._number, self._threads, repeats))
        function = getattr(self._library, f"vivace_probe_{name}")
        out = ctypes.c_void_p(pointer(rates))
        found = function(isa, *what, threads, *amount, count, out)
        return rates.tolist() if found else None

    def packed_bytes(self, N: int, K: int, group: int | None) -> int:
        """Bytes of a packed matrix."""
        name = "vivace_packed_int8_bytes" if group is None else "vivace_packed_int4_bytes"
        function = getattr(self._library, name)
        function.restype = ctypes.c_int64
        sizes = (N, K) if group is None else (N, K, group)
        count: int = function(*map(ctypes.c_int64, sizes))
        return count

    def pack(self, out: Array, weight: Quantized) -> None:
        """Write a matrix into as many bytes as `packed_bytes` says."""
        N, K = weight.shape
        arrays = (out, weight.q, weight.scales)
        pointers = [ctypes.c_void_p(pointer(array)) for array in arrays]
        if weight.group is None:
            self._library.vivace_pack_int8(*pointers, ctypes.c_int64(N), ctypes.c_int64(K))
        else:
            sizes = map(ctypes.c_int64, (N, K, weight.group))
            self._library.vivace_pack_int4(*pointers, *sizes)

    def record(self, call_ops: Callable[[], None]) -> list[Recorded]:
        """The ops that this calls, which are not run. Their arguments point to what their buffers are now."""
        found: list[Recorded] = []
        self._recorded = found
        try:
            call_ops()
        finally:
            self._recorded = None
        return found

    def run_program(
        self,
        program: int,
        sizes: Array,
        more: Sequence[Recorded],
        seconds: Array | None = None,
    ) -> None:
        """Run a program of `make_program`, then these calls, with the GIL released.

        `seconds` (fp64, one for each call) takes how long each ran.
        """
        calls = (_Call(call.address, ctypes.addressof(call.args)) for call in more)
        array = (_Call * len(more))(*calls)
        self._library.vivace_program_run(
            *map(ctypes.c_void_p, (self._context, program, pointer(sizes))),
            array,
            ctypes.c_int64(len(more)),
            ctypes.c_void_p(optional_pointer(seconds)),
        )

    def make_program(self, recording: ctypes.Structure, owner: object) -> int:
        """A program of the library (`cpu::Recording` of kernels/cpu/program.h), freed with its owner."""
        create = self._library.vivace_program_create
        create.restype = ctypes.c_void_p
        program: int | None = create(ctypes.byref(recording))
        if program is None:
            raise MemoryError("no memory for a program")
        destroy = self._library.vivace_program_destroy
        destroy.restype, destroy.argtypes = None, (ctypes.c_void_p,)
        weakref.finalize(owner, destroy, program)
        return program

    def round(
        self, out: Array, rows: Array, N: int, K: int, group: int | None, *, first: int
    ) -> bool:
        """Round rows of a matrix [N, K], fp32, to their places from `first` on; `out` was zero. False: one is not finite.

        Threads may call it for rows of different tiles of 32.
        """
        pointers = [ctypes.c_void_p(pointer(array)) for array in (out, rows)]
        sizes = (N, K, first, len(rows)) if group is None else (N, K, group, first, len(rows))
        function = (
            self._library.vivace_round_int8 if group is None else self._library.vivace_round_int4
        )
        is_finite: int = function(*pointers, *map(ctypes.c_int64, sizes))
        return bool(is_finite)

    def isas(self) -> dict[str, int]:
        """The instruction sets that the library has and this CPU too, by name, the best last."""
        number, found = 0, {}
        while (name := self._library.vivace_isa_name(number)) is not None:
            if self._library.vivace_has_isa(number):
                found[name.decode()] = number
            number += 1
        return found
