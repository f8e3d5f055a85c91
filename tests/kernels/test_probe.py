"""The probes find what this machine can do: plausible numbers for every instruction set, none where there is no instruction."""

from pathlib import Path

import pytest

from vivace.kernels.cpu.library import Library
from vivace.kernels.cpu.probe import Steps, probe, probe_read, probe_steps

SMALL = 4 << 20
WITHOUT = {"portable": {Steps.INT8, Steps.BF16}, "avx2": {Steps.BF16}}


def flags():
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])


@pytest.fixture(params=Library(threads=1).isas())
def isa(request):
    return request.param


@pytest.mark.parametrize("threads", [1, 3])
def test_memory_is_read_at_a_plausible_rate(isa, threads):
    library = Library(threads=threads, isa=isa)
    rates = probe_read(library, repeats=3, num_bytes=SMALL)
    assert len(rates) == 3
    assert all(1e8 < rate < 1e13 for rate in rates)


@pytest.mark.parametrize("what", Steps)
def test_multiply_adds_run_at_a_plausible_rate(isa, what):
    without = WITHOUT.get(isa, set() if "avx512_bf16" in flags() else {Steps.BF16})
    rates = probe_steps(Library(threads=1, isa=isa), what, repeats=2, seconds=0.002)
    assert len(rates) == (0 if what in without else 2)
    assert all(1e8 < rate < 1e14 for rate in rates)


def test_one_call_finds_all_peaks(isa):
    found = probe(Library(threads=1, isa=isa), repeats=1, read_bytes=SMALL)
    has = {"fp32": found.fp32, "int8": found.int8, "bf16": found.bf16}
    without = {one.name.lower() for one in WITHOUT.get(isa, set())}
    assert all(has[name] is None for name in without)
    assert found.read > 1e8 and found.fp32 > 1e8


@pytest.mark.parametrize("num_bytes", [0, -1024, 1000])
def test_what_cannot_be_read_is_refused(num_bytes):
    with pytest.raises(ValueError, match=f"num_bytes must be whole KiB, got {num_bytes}"):
        probe_read(Library(threads=1), repeats=1, num_bytes=num_bytes)


def test_more_than_there_is_is_no_memory():
    with pytest.raises(MemoryError, match="no memory to read"):
        probe_read(Library(threads=1), repeats=1, num_bytes=1 << 46)
