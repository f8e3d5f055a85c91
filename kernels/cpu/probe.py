"""What this machine can do at most: what a measured op is a share of. Probes run on pinned threads of their own."""

import ctypes
from dataclasses import dataclass
from enum import Enum
from statistics import median

from vivace.kernels.cpu.library import Library

READ_BYTES = 512 << 20  # of each thread: far more than any cache keeps
SECONDS = 0.05


class Steps(Enum):
    """Multiply-adds on registers; the value is what the library calls them."""

    FP32 = 0
    INT8 = 1
    BF16 = 2


@dataclass(frozen=True, slots=True)
class Peaks:
    """Of all threads together; None where the CPU or the instruction set has no such instruction."""

    read: float  # bytes/s from memory
    fp32: float  # ops/s; a multiply-add is two
    int8: float | None
    bf16: float | None


def probe(library: Library, *, repeats: int, read_bytes: int = READ_BYTES) -> Peaks:
    """Medians, with as many threads and the instruction set of the library. Takes a second or two."""
    read = median(probe_read(library, repeats=repeats, num_bytes=read_bytes))
    steps = [probe_steps(library, what, repeats=repeats) for what in Steps]
    fp32, int8, bf16 = (median(rates) if rates else None for rates in steps)
    assert fp32 is not None
    return Peaks(read, fp32, int8, bf16)


def probe_read(library: Library, *, repeats: int, num_bytes: int = READ_BYTES) -> list[float]:
    """Bytes/s of each repeat, from memory in huge pages. `num_bytes` are of each thread, and whole KiB."""
    if num_bytes < 1024 or num_bytes % 1024:
        raise ValueError(f"num_bytes must be whole KiB, got {num_bytes}")
    rates = library.probe("read", repeats, (), (ctypes.c_int64(num_bytes),))
    if rates is None:
        raise MemoryError(f"no memory to read {num_bytes} bytes with each thread")
    return rates


def probe_steps(
    library: Library, what: Steps, *, repeats: int, seconds: float = SECONDS
) -> list[float]:
    """Ops/s of each repeat; none if the CPU or the instruction set has no such instruction."""
    number = ctypes.c_int32(what.value)
    return library.probe("steps", repeats, (number,), (ctypes.c_double(seconds),)) or []
