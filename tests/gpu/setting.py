"""What every part of the check is told."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch

from tests.gpu.results import Result
from tests.gpu.timing import Meter
from vivace.kernels.backend import Backend, Ops, load

TOLERANCE_BF16 = 1e-2  # of the norm, against the same rounded inputs


@dataclass(frozen=True)
class Setting:
    """One run. `is_tiny` shapes are for a rehearsal on a CPU."""

    device: str = "cuda"
    backend: str = "triton"
    is_tiny: bool = False
    ceilings: Mapping[str, float] = field(default_factory=dict)  # rates, once they are measured

    @property
    def is_gpu(self) -> bool:
        """Whether there is something to time."""
        return self.device.startswith("cuda")

    def ops(self) -> Ops:
        """The backend that is checked, with scratch of its own that nobody has written yet."""
        return load(Backend(self.backend), device=self.device)

    def reference(self) -> Ops:
        """The specification, on the same device."""
        return load(Backend.REFERENCE, device=self.device)


Part = Callable[[Setting], Iterator[Result]]


def meter_of(setting: Setting, ops: Ops) -> Meter:
    """Times calls of these ops; while it does they may compile nothing and their scratch may not grow."""

    def seal() -> None:
        if ops.compilation is not None:
            ops.compilation.seal(strict=True)

    return Meter(setting.device, seal)


def unsealed(setting: Setting) -> Meter:
    """Times what is not ours."""
    return Meter(setting.device, lambda: None)


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """||got - want|| / ||want|| in fp64; infinite where one side alone is not finite."""
    a, b = got.double().flatten(), want.double().flatten()
    if not torch.equal(a.isfinite(), b.isfinite()):
        return float("inf")
    a, b = a[a.isfinite()], b[b.isfinite()]
    return float((a - b).norm() / b.norm().clamp(min=1e-30))
