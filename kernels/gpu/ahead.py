"""Kernels compiled ahead of time, for a GPU that is not there: into a cache that serving finds, or to be judged.

A process compiles for one target at a time: the last launcher that was made is the one that Triton listens to.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import triton

from vivace.kernels.compilation import Variant
from vivace.kernels.gpu import machine_code
from vivace.kernels.gpu.compilation import Watch
from vivace.kernels.gpu.launcher import Launcher
from vivace.kernels.gpu.target import find_target

Expected = Mapping[str, Mapping[str, Sequence[str]]]  # by target, then by kernel: keys of MEANT


@contextmanager
def compiling(target: str, cache_dir: Path, tuned_for: str | None = None) -> Iterator[Launcher]:
    """A launcher that compiles what it is asked to launch, into a folder. Raises ValueError for a target that there is not."""
    with knobs_kept():
        kind = find_target(target)
        yield Launcher("meta", target=kind, cache_dir=cache_dir, tuned_for=tuned_for)


@contextmanager
def listing(target: str) -> Iterator[Launcher]:
    """A launcher that notes down what it would compile."""
    with knobs_kept():
        launcher = Launcher("meta", target=find_target(target))
        launcher.watch.list_only()
        yield launcher


@contextmanager
def knobs_kept() -> Iterator[None]:
    """Triton's settings and driver are of the whole process: they are given back."""
    with (
        triton.knobs.cache.scope(),
        triton.knobs.runtime.scope(),
        triton.knobs.compilation.scope(),
    ):
        yield


def judge(watch: Watch, target: str) -> dict[Variant, list[str]]:
    """What is wrong with the machine code of each variant: mostly nothing."""
    kind = find_target(target)
    if not kind.is_judged:
        return {variant: [] for variant in watch.variants}
    return {
        variant: machine_code.problems(
            machine_code.read(kernel, kind), kind, meant(kernel.src.fn, target)
        )
        for variant, kernel in watch.compiled.items()
    }


def meant(function: Any, target: str) -> Sequence[str]:
    """What the module of a kernel says that its machine code must show on a target, in a table EXPECT."""
    module = sys.modules[function.module]
    expected: Expected = getattr(module, "EXPECT", {})
    return expected.get(target, {}).get(function.__name__, ())
