"""The GPUs that kernels are compiled for by name, without one: what tells them apart, and what a kernel may use there."""

from dataclasses import dataclass

import torch
from triton.backends.compiler import GPUTarget

MAX_REGISTERS = 255  # of a thread; 65,536 of a multiprocessor


@dataclass(frozen=True, slots=True)
class Target:
    """One kind of GPU. Where `is_judged`, its machine code must pass `machine_code.problems`; elsewhere it must exist."""

    name: str
    triton: GPUTarget
    max_shared_bytes: int | None  # of one program; None: default tiles are not meant for it
    is_judged: bool


TARGETS = {
    one.name: one
    for one in (
        Target("sm_80", GPUTarget("cuda", 80, 32), 166_912, True),
        Target("sm_90", GPUTarget("cuda", 90, 32), 232_448, True),
        Target("sm_100", GPUTarget("cuda", 100, 32), 232_448, False),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), None, True),
    )
}


def find_target(name: str) -> Target:
    """Raises ValueError saying which there are."""
    if name not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {name!r}")
    return TARGETS[name]


class TargetDriver:
    """Stands for a GPU's driver before Triton, which then compiles for it and cannot launch.

    Triton asks for no more than this to compile. A device is a key of its caches: with the driver itself as the key, no two
    drivers share what is in memory.
    """

    def __init__(self, target: Target) -> None:
        self._target = target.triton

    def get_current_target(self) -> GPUTarget:
        """What to compile for."""
        return self._target

    def get_current_device(self) -> "TargetDriver":
        """What is compiled is kept by this."""
        return self

    def get_current_stream(self, device: "TargetDriver") -> int:
        """There is none; Triton asks before it knows that nothing will be launched."""
        return 0

    def get_active_torch_device(self) -> torch.device:
        """Of tensors without memory."""
        return torch.device("meta")
