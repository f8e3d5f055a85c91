"""Launches Triton kernels: the one place between an op and a device.

Holds what ops need and must not allocate: scratch, which grows before serving starts and never after.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import triton

Grid = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Config:
    """Tile sizes, by the names of a kernel's constexprs, and how it is compiled."""

    tiles: Mapping[str, int] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2


class Launcher:
    """Kernels of one device. Its ops run in the order of their launches."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.is_interpreted: bool = triton.knobs.runtime.interpret
        if self.device.type == "cpu" and not self.is_interpreted:
            raise ValueError(
                "device of backend 'triton' must be a GPU such as 'cuda', got 'cpu'; "
                "TRITON_INTERPRET=1 interprets the kernels, for tests"
            )
        is_cuda = self.device.type == "cuda" and torch.version.cuda is not None
        self.has_tma = is_cuda and torch.cuda.get_device_capability(self.device) >= (9, 0)
        self._scratch: dict[str, torch.Tensor] = {}

    @property
    def upcast(self) -> bool:
        """Whether kernels must widen bf16 before they compute: the interpreter's bf16 arithmetic is wrong, silently."""
        return self.is_interpreted

    def config(self, op: str, bucket: str, default: Config) -> Config:
        """How to run an op on shapes of this bucket: `default`, unless this device was tuned."""
        return default

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of one op until its last kernel has run, contents undefined; the next call with this name gives it away."""
        count = 1
        for size in shape:
            count *= size
        kept = self._scratch.get(name)
        if kept is None or kept.numel() < count or kept.dtype != dtype:
            kept = self._scratch[name] = torch.empty(count, dtype=dtype, device=self.device)
        return kept[:count].view(shape)

    def launch(
        self,
        kernel: Any,
        grid: Grid,
        args: tuple[Any, ...],
        constexprs: Mapping[str, Any],
        config: Config,
    ) -> None:
        """Run a kernel: `args` in its order, then its constexprs and tiles by name. A grid without programs is no launch."""
        if 0 in grid:
            return
        run: Callable[..., None] = kernel[grid]
        run(
            *args,
            **constexprs,
            **config.tiles,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
