"""Launches Triton kernels: the one place between an op and a device.

Holds what ops need and must not allocate: scratch, which grows before serving starts and never after.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import triton

from vivace.kernels.gpu import cache, tuned
from vivace.kernels.gpu.compilation import Watch
from vivace.kernels.gpu.target import Target, TargetDriver
from vivace.kernels.gpu.tuned import Config

_log = logging.getLogger(__name__)
Grid = tuple[int, ...]
__all__ = ["Config", "Grid", "Launcher"]


def free_bytes(device: str) -> int:
    """Memory of a GPU that nobody has taken. Raises ValueError if there is no such GPU."""
    try:
        free, _ = torch.cuda.mem_get_info(device)
    except (AssertionError, RuntimeError, ValueError) as error:  # torch raises all of these
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {device!r} is no GPU that can be used: {reason}") from error
    return int(free)


class Launcher:
    """Kernels of one device. Its ops run in the order of their launches.

    Given a target, it compiles what it is asked to launch, for that, and needs no GPU; `tuned_for` then names the device whose
    configs it shall have. What is compiled is kept in `cache_dir`. Both hold for Triton in all of this process.
    """

    def __init__(
        self,
        device: str,
        *,
        cache_dir: Path | None = None,
        target: Target | None = None,
        tuned_for: str | None = None,
    ) -> None:
        self.device = torch.device("meta" if target else device)
        self.is_interpreted: bool = triton.knobs.runtime.interpret
        if self.device.type == "cpu" and not self.is_interpreted:
            raise ValueError(
                "device of backend 'triton' must be a GPU such as 'cuda', got 'cpu'; "
                "TRITON_INTERPRET=1 interprets the kernels, for tests"
            )
        if target is not None:
            if self.is_interpreted:
                raise ValueError("TRITON_INTERPRET=1 is set: nothing can be compiled")
            triton.runtime.driver.set_active(TargetDriver(target))
        if self.device.type == "cuda":
            if self.device.index is not None:  # Triton launches on the current device
                torch.cuda.set_device(self.device)
            tuned_for = torch.cuda.get_device_name(self.device)
        self.has_tma = False  # whether kernels may load boxes of a tensor by its descriptor
        if not self.is_interpreted:
            compiled_for = triton.runtime.driver.active.get_current_target()
            self.has_tma = compiled_for.backend == "cuda" and compiled_for.arch >= 90
            if compiled_for.backend == "hip":
                # Else a tensor's size, under 2 GiB or over, makes one more variant.
                triton.knobs.amd.use_buffer_ops = False
            if cache_dir is not None:
                cache.use(cache_dir, compiled_for)
        self.watch = Watch()
        self.configs: dict[tuple[str, str], Config] = {}  # that ops asked for, as they got them
        self._tuned = tuned.read(tuned_for, triton.__version__) if tuned_for else {}
        self._scratch: dict[str, torch.Tensor] = {}

    @property
    def upcast(self) -> bool:
        """Whether kernels must widen bf16 before they compute: the interpreter's bf16 arithmetic is wrong, silently."""
        return self.is_interpreted

    def config(self, op: str, bucket: str, default: Config) -> Config:
        """How to run an op on shapes of this bucket: `default`, unless this device was tuned."""
        config = self.configs.get((op, bucket))
        if config is None:
            config = self._tuned.get(op, {}).get(bucket, default)
            if config.tiles.keys() != default.tiles.keys():
                _log.warning("tuned config of %s %s is of another kernel and not used", op, bucket)
                config = default
            self.configs[op, bucket] = config
        return config

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Memory of one op until its last kernel has run, contents undefined; the next call with this name gives it away."""
        count = 1
        for size in shape:
            count *= size
        kept = self._scratch.get(name)
        if kept is None or kept.numel() < count or kept.dtype != dtype:
            self.watch.late(f"scratch {name} must grow to {count} numbers of {dtype}")
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
        options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
        if self.device.type == "meta":
            compiled = kernel.warmup(*args, grid=grid, **constexprs, **config.tiles, **options)
            if compiled is not None:
                self.watch.note_compiled(compiled)
            return
        if self.is_interpreted:
            self.watch.note_interpreted(kernel, args, constexprs, config)
        kernel[grid](*args, **constexprs, **config.tiles, **options)
