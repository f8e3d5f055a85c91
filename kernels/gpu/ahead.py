"""Kernels compiled ahead of time, for a GPU that is not there: into a cache that serving finds, or to be judged.

A process compiles for one target at a time: the last launcher that was made is the one that Triton listens to.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import triton

from vivace.kernels.compilation import Variant
from vivace.kernels.gpu import machine_code
from vivace.kernels.gpu.compilation import Watch
from vivace.kernels.gpu.launcher import Launcher
from vivace.kernels.gpu.target import find_target

Expected = Mapping[str, Mapping[str, Sequence[str]]]  # by target, then by words: keys of MEANT


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
        triton.knobs.amd.scope(),
    ):
        try:
            yield
        finally:
            with suppress(RuntimeError):  # without a GPU there is no driver to go back to
                triton.runtime.driver.reset_active()


def judge(watch: Watch, target: str) -> dict[Variant, list[str]]:
    """What is wrong with the machine code of each variant: mostly nothing."""
    kind = find_target(target)
    if not kind.is_judged:
        return {variant: [] for variant in watch.variants}
    return {
        variant: machine_code.problems(
            machine_code.read(kernel, kind), kind, meant(kernel.src.fn.module, variant, target)
        )
        for variant, kernel in watch.compiled.items()
    }


def meant(module: str, variant: Variant, target: str) -> list[str]:
    """What a kernel's module says, in a table EXPECT, that the machine code of a variant must show on a target.

    An entry is of the variants that have all its words: kernel, constexprs such as `BLOCK_M=128`, types such as `*bf16:16`.
    """
    expected: Expected = getattr(sys.modules[module], "EXPECT", {})
    entries = expected.get(target, {}).items()
    return [name for words, names in entries if has_words(variant, words) for name in names]


def has_words(variant: Variant, words: str) -> bool:
    """Whether an entry of EXPECT is of this variant."""
    constexprs = (f"{name}={value}" for name, value in variant.constexprs)
    return {variant.kernel, *constexprs, *variant.arguments}.issuperset(words.split())
