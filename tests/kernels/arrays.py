"""Arrays in and out of a backend: outputs start as NaN or all bits set, so what is not written cannot pass."""

from dataclasses import dataclass

import numpy as np
import pytest

from vivace.kernels.backend import Backend, load
from vivace.kernels.cpu.library import Library


@dataclass(frozen=True)
class Isa:
    """The CPU backend with one instruction set."""

    value: str


ISAS = tuple(map(Isa, Library(threads=1).isas()))
BACKENDS = (Backend.REFERENCE, *ISAS)
TRITON = pytest.param(Backend.TRITON, marks=pytest.mark.triton)  # interpreted
EVERYWHERE = (*BACKENDS, TRITON)  # for ops that Triton has


def ops_of(backend, threads=1):
    """The ops of a backend; of the CPU, with the best instruction set unless one is named."""
    if isinstance(backend, Isa):
        return load(Backend.CPU, threads=threads, isa=backend.value)
    if backend is Backend.CPU:
        return load(backend, threads=threads)
    return load(backend, device="cpu")


def out(ops, *shape, dtype=np.float32):
    """A poisoned output."""
    return ops.memory.upload(
        np.full(shape, np.nan if dtype == np.float32 else dtype(~dtype(0)), dtype)
    )


def run(ops, op, outs, *ins, **attrs):
    """Call an op on host arrays; `outs` are poisoned buffers. Returns them on the host."""
    inputs = [None if one is None else ops.memory.upload(np.ascontiguousarray(one)) for one in ins]
    getattr(ops, op)(*outs, *inputs, **attrs)
    return [ops.memory.read(one).copy() for one in outs]


def close(got, want, tolerance=2e-6):
    """Within a share of the largest value wanted."""
    assert got.shape == want.shape and not np.isnan(got).any()
    assert np.abs(got - want).max(initial=0) <= tolerance * max(np.abs(want).max(initial=0), 1e-30)
