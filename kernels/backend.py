"""Binds every op to one implementation, once, at start-up.

Only the backend asked for is imported: serving on a CPU never loads torch. Nothing is chosen later.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from enum import Enum
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vivace.kernels import (
    add,
    add_rmsnorm,
    add_rmsnorm_quantize,
    attention,
    block_meta_update,
    block_score,
    block_topk,
    embed,
    embed_int8,
    expert_down,
    expert_gated,
    expert_linear,
    expert_linear_int4,
    expert_linear_int8,
    gated,
    gated_quantize,
    kept_mass,
    kv_read,
    linear,
    linear_int4,
    linear_int8,
    logprobs,
    moe_assign,
    moe_combine,
    moe_route,
    quantize,
    rmsnorm,
    rmsnorm_quantize,
    rope_kv_write,
    rope_table,
    sample,
    softcap,
    take_rows,
)
from vivace.kernels.compilation import Compilation
from vivace.kernels.memory import Memory
from vivace.kernels.recorder import Recorder


class Backend(Enum):
    """Where the ops of this process run."""

    REFERENCE = "reference"  # torch, any device: the specification
    CPU = "cpu"  # NumPy arrays and our C++ library, no torch
    TRITON = "triton"  # torch tensors and our Triton kernels, on a GPU


@dataclass(frozen=True, slots=True)
class Ops:
    """One function per op, all of one backend, and its memory. Handed to the runner; there is no global."""

    memory: Memory
    progress: Callable[
        [], int
    ]  # how many ops have finished; a watchdog may call it from another thread
    recorder: Recorder | None  # None: the backend's ops can be called one by one only
    isa: str | None  # the instruction set; None: the backend has no choice of them
    compilation: Compilation | None  # None: the backend compiles nothing while it runs
    linear: linear.Run
    quantize: quantize.Run
    linear_int8: linear_int8.Run
    linear_int4: linear_int4.Run
    embed: embed.Run
    embed_int8: embed_int8.Run
    rmsnorm: rmsnorm.Run
    add_rmsnorm: add_rmsnorm.Run
    rmsnorm_quantize: rmsnorm_quantize.Run
    add_rmsnorm_quantize: add_rmsnorm_quantize.Run
    rope_table: rope_table.Run
    rope_kv_write: rope_kv_write.Run
    block_meta_update: block_meta_update.Run
    block_score: block_score.Run
    block_topk: block_topk.Run
    attention: attention.Run
    kept_mass: kept_mass.Run
    gated: gated.Run
    gated_quantize: gated_quantize.Run
    softcap: softcap.Run
    add: add.Run
    moe_route: moe_route.Run
    expert_linear: expert_linear.Run
    expert_linear_int8: expert_linear_int8.Run
    expert_linear_int4: expert_linear_int4.Run
    moe_assign: moe_assign.Run
    expert_gated: expert_gated.Run
    expert_down: expert_down.Run
    moe_combine: moe_combine.Run
    take_rows: take_rows.Run
    sample: sample.Run
    logprobs: logprobs.Run
    kv_read: kv_read.Run


NO_OPS = ("memory", "progress", "recorder", "isa", "compilation")  # fields of Ops


def load(
    backend: Backend,
    *,
    threads: int | None = None,
    isa: str | None = None,
    device: str | None = None,
    cache_dir: Path | None = None,
) -> Ops:
    """Bind all ops. `threads` (unset: 1) and `isa` (unset: the best there is) are for CPU, `device` for the others,
    `cache_dir`, where compiled kernels are kept, for TRITON.

    An op that the backend does not have raises NotImplementedError when it is called. Raises ImportError saying what to
    install or build if the backend is not there.
    """
    if cache_dir is not None and backend is not Backend.TRITON:
        raise ValueError(f"cache_dir is for backend 'triton', got {str(cache_dir)!r}")
    if backend is Backend.CPU:
        if device is not None:
            raise ValueError(f"device is for the other backends, got {device!r}")
        return _load_cpu(1 if threads is None else threads, isa)
    if threads is not None or isa is not None:
        raise ValueError(f"threads and isa are for the CPU backend, got {threads!r} and {isa!r}")
    if backend is Backend.TRITON:
        return _load_triton("cuda" if device is None else device, cache_dir)
    return _load_reference("cpu" if device is None else device)


def _load_cpu(threads: int, isa: str | None) -> Ops:
    library = import_module("vivace.kernels.cpu.library").Library(threads=threads, isa=isa)
    recorder = import_module("vivace.kernels.cpu.recorder").CpuRecorder(library)
    memory = import_module("vivace.kernels.memory.cpu").CpuMemory(library)
    bound = _bind(Backend.CPU, lambda module: module.bind(library))
    return Ops(
        memory=memory,
        progress=library.progress,
        recorder=recorder,
        isa=library.isa,
        compilation=None,
        **bound,
    )


def _load_reference(device: str) -> Ops:
    try:
        memory = import_module("vivace.kernels.memory.reference").TorchMemory(device)
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; install vivace[gpu]") from error
    counter = Counter()
    bound = _bind(Backend.REFERENCE, lambda module: counter.counted(module.run))
    return Ops(
        memory=memory,
        progress=counter.read,
        recorder=None,
        isa=None,
        compilation=None,
        **bound,
    )


def _load_triton(device: str, cache_dir: Path | None) -> Ops:
    try:
        launcher = import_module("vivace.kernels.gpu.launcher").Launcher(
            device, cache_dir=cache_dir
        )
    except ModuleNotFoundError as error:
        raise ImportError(f"{error}; install vivace[gpu]") from error
    return bind_triton(launcher)


def bind_triton(launcher: Any) -> Ops:
    """The ops of a `kernels.gpu.launcher.Launcher`."""
    memory = import_module("vivace.kernels.memory.triton").TritonMemory(launcher.device)
    counter = Counter()
    bound = _bind(Backend.TRITON, lambda module: counter.counted(module.bind(launcher)))
    return Ops(
        memory=memory,
        progress=counter.read,
        recorder=None,
        isa=None,
        compilation=launcher.watch,
        **bound,
    )


def _bind(
    backend: Backend, bind: Callable[[Any], Callable[..., None]]
) -> dict[str, Callable[..., None]]:
    names = [one.name for one in fields(Ops) if one.name not in NO_OPS]
    return {name: _bind_one(backend, name, bind) for name in names}


def _bind_one(
    backend: Backend, name: str, bind: Callable[[Any], Callable[..., None]]
) -> Callable[..., None]:
    module = f"vivace.kernels.{name}.{backend.value}"
    if find_spec(module) is None:
        return _lacking(backend, name)
    return _checked(import_module(f"vivace.kernels.{name}").check, bind(import_module(module)))


def _lacking(backend: Backend, name: str) -> Callable[..., None]:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"backend {backend.value!r} has no op {name!r}")

    return refuse


class Counter:
    """Ops that have finished. Written by the engine loop, read by whoever watches it."""

    def __init__(self) -> None:
        self.count = 0

    def read(self) -> int:
        """The count so far."""
        return self.count

    def counted(self, run: Callable[..., None]) -> Callable[..., None]:
        """An op that is counted."""

        def run_and_count(*args: Any, **kwargs: Any) -> None:
            run(*args, **kwargs)
            self.count += 1

        return run_and_count


def _checked(check: Callable[..., None], run: Callable[..., None]) -> Callable[..., None]:
    def checked(*args: Any, **kwargs: Any) -> None:
        check(*args, **kwargs)
        run(*args, **kwargs)

    return checked
