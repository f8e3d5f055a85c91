"""What a backend compiles while it runs: known before serving starts, counted and perhaps refused after."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class Variant:
    """A kernel as it is compiled: another value of anything here is other machine code."""

    op: str
    kernel: str
    constexprs: tuple[tuple[str, Any], ...]
    arguments: tuple[str, ...]  # their types; `:16` where divisible by 16
    num_warps: int
    num_stages: int

    def __str__(self) -> str:
        constexprs = " ".join(f"{name}={value}" for name, value in self.constexprs)
        options = f"warps={self.num_warps} stages={self.num_stages}"
        return f"{self.op}.{self.kernel} {constexprs} {options} ({', '.join(self.arguments)})"


class CompiledAfterReady(RuntimeError):
    """A kernel was compiled, or scratch grew, while requests were served: a step waited for it."""


class Compilation(Protocol):
    """Of one backend that is loaded."""

    variants: Sequence[Variant]  # met so far; of a launcher that launches on a device: none
    num_compiled_after_ready: int  # what is loaded from the cache is not compiled

    def seal(self, strict: bool) -> None:
        """From now on what is compiled, or allocated, is counted and logged; with `strict` it raises CompiledAfterReady."""
        ...
