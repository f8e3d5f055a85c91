"""Binding: once, checked, and refused in words when something does not fit."""

import ctypes
import gc
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from tests.kernels.arrays import EVERYWHERE, ISAS, ops_of, out
from vivace.kernels.backend import Backend, load
from vivace.kernels.buffer import DType
from vivace.kernels.cpu.library import ABI, Library
from vivace.kernels.linear.cpu import Args

each_backend = pytest.mark.parametrize("backend", EVERYWHERE, ids=lambda one: one.value)


@each_backend
@pytest.mark.parametrize(
    ("op", "shapes", "attrs", "words"),
    [
        ("linear", [(2, 5), (2, 3), (5, 4)], {}, r"x must be \[any, 4\], got \[2, 3\]"),
        ("linear", [(2, 6), (2, 4), (5, 4)], {}, r"out must be \[2, 5\], got \[2, 6\]"),
        ("rmsnorm", [(2, 4), (2, 4), (5,)], {"eps": 1e-6}, r"x must be \[any, 5\]"),
        ("rmsnorm", [(2, 4), (2, 4), (4,)], {"eps": -1.0}, "eps must be at least 0, got -1.0"),
        ("gated", [(2, 4), (2, 7)], {}, r"gate_up must be \[2, 8\], got \[2, 7\]"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_with_both_shapes(backend, op, shapes, attrs, words):
    ops = ops_of(backend)
    with pytest.raises(ValueError, match=words):
        getattr(ops, op)(*(out(ops, *shape) for shape in shapes), **attrs)


@each_backend
def test_a_wrong_type_is_refused(backend):
    ops = ops_of(backend)
    with pytest.raises(ValueError, match=r"tokens must hold int32, got .*float32"):
        ops.embed(out(ops, 2, 3), out(ops, 2), out(ops, 5, 3))


@each_backend
def test_every_op_counts_as_progress(backend):
    ops = ops_of(backend)
    before = ops.progress()
    for _ in range(3):
        ops.gated(out(ops, 1, 2), out(ops, 1, 4))
    assert ops.progress() == before + 3


@each_backend
def test_memory_is_what_it_says(backend):
    memory = ops_of(backend).memory
    buffer = memory.empty((12,), DType.FP32)
    view = memory.view(buffer, (2, 3))
    assert tuple(view.shape) == (2, 3)
    cache = memory.kv_cache(3, 16, 2, 8, DType.FP32)
    assert cache.shape[:2] == (3, 2) and set(cache.shape[2:]) == {16, 2, 8}
    assert (memory.read(cache) == 0).all()
    array = np.arange(6, dtype=np.int32)
    assert memory.read(memory.upload(array)).tolist() == array.tolist()


def test_a_strided_array_is_refused_by_the_cpu():
    ops = load(Backend.CPU)
    wide = np.zeros((4, 8), np.float32)
    with pytest.raises(ValueError, match="not dense"):
        ops.gated(wide[:, ::4], np.zeros((4, 4), np.float32))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            {"backend": Backend.CPU, "isa": "mmx"},
            "isa must be one of portable.*on this CPU, got 'mmx'",
        ),
        ({"backend": Backend.CPU, "threads": 0}, "threads must be at least 1, got 0"),
        ({"backend": Backend.CPU, "device": "cuda"}, "device is for the other backends"),
        ({"backend": Backend.REFERENCE, "threads": 2}, "threads and isa are for the CPU backend"),
    ],
)
def test_arguments_of_another_backend_are_refused_not_ignored(arguments, words):
    with pytest.raises(ValueError, match=words):
        load(**arguments)


def test_each_instruction_set_has_sums_of_its_own():
    """Of as many lanes as its vectors have: what is forced is what runs."""
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal((8, 1000), dtype=np.float32) for _ in "xw")
    found = []
    for isa in ISAS:
        result = np.empty((8, 8), np.float32)
        ops_of(isa).linear(result, x, w)
        found.append(result.tobytes())
    assert len(set(found)) == len(ISAS)


def test_a_struct_of_another_size_is_refused():
    """What would happen with a library of another version."""

    class Longer(ctypes.Structure):
        _pack_ = 1
        _fields_ = (*Args._fields_, ("more", ctypes.c_int64))

    with pytest.raises(ImportError, match=r"arguments of linear: 64 bytes.*72 in this package"):
        Library(threads=1).op("linear", Longer)


def test_a_library_that_is_not_there_says_how_to_build_it(tmp_path):
    with pytest.raises(ImportError, match=r"cannot load gone\.so.*build it: pip install"):
        Library(threads=1, path=tmp_path / "gone.so")


def test_the_reference_backend_without_torch_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "vivace.kernels.memory.reference", raising=False)
    with pytest.raises(ImportError, match=r"torch.*install vivace\[gpu\]"):
        load(Backend.REFERENCE)


def test_a_library_of_another_abi_is_refused(tmp_path):
    source, path = tmp_path / "other.c", tmp_path / "other.so"
    source.write_text("int vivace_abi(void) { return 99; }\n")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    with pytest.raises(ImportError, match=f"has ABI 99, this package needs {ABI}"):
        Library(threads=1, path=path)


def test_threads_end_with_the_ops():
    def num_threads():
        status = Path("/proc/self/status").read_text()
        return int(status.split("Threads:")[1].split()[0])

    before = num_threads()
    ops = load(Backend.CPU, threads=4)
    assert num_threads() == before + 3
    del ops
    gc.collect()
    assert num_threads() == before


def test_an_idle_pool_sleeps():
    ops = load(Backend.CPU, threads=2)
    x = np.zeros((64, 64), np.float32)
    ops.linear(np.empty((64, 64), np.float32), x, x)
    waited = threading.Event()
    start = _cpu_s()
    waited.wait(0.5)
    assert _cpu_s() - start < 0.05


def _cpu_s():
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def test_the_cpu_backend_needs_no_torch():
    code = (
        "import sys; from vivace.kernels.backend import Backend, load; load(Backend.CPU);"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
