"""Every setting of the system, in one frozen tree.

Built once at start-up from the command line. Nothing is read from the environment and nothing changes
afterwards. Values worked out from the model or the machine (number of blocks, threads) are not
settings: they live in `engine/plan.py`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from vivace.engine.errors import ConfigError
from vivace.kernels.backend import Backend


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """How work is batched."""

    max_step_tokens: int = 512  # tokens per forward pass: more is throughput, fewer is latency
    max_running: int = 64  # requests holding cache blocks at once
    max_waiting: int = 1024  # queue length beyond which requests are refused as Overloaded

    def __post_init__(self) -> None:
        for name in ("max_step_tokens", "max_running", "max_waiting"):
            _at_least("scheduler", name, getattr(self, name), 1)
        if self.max_step_tokens < self.max_running:
            raise ConfigError(
                f"scheduler.max_step_tokens ({self.max_step_tokens}) must be at least "
                f"scheduler.max_running ({self.max_running}): each decodes one token a step"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """The paged KV cache."""

    block_tokens: int = 16  # tokens per block, which is also the grain of prefix sharing
    memory_bytes: int | None = None  # unset: min(1 GiB, a quarter of the memory that is free)
    prefix_sharing: bool = True  # find prompts' blocks that an earlier request has computed

    def __post_init__(self) -> None:
        _at_least("cache", "block_tokens", self.block_tokens, 1)
        if self.memory_bytes is not None:
            _at_least("cache", "memory_bytes", self.memory_bytes, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuConfig:
    """The C++ backend."""

    threads: int | None = None  # unset: one per CPU this process may use
    isa: str | None = None  # unset: the best the CPU has

    def __post_init__(self) -> None:
        if self.threads is not None:
            _at_least("cpu", "threads", self.threads, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The root of the tree: everything an engine needs to know."""

    model: Path
    backend: Backend = Backend.CPU
    device: str = "cpu"  # of the reference backend
    max_context_tokens: int | None = None  # unset: the model's own
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    cpu: CpuConfig = field(default_factory=CpuConfig)


def _at_least(section: str, name: str, value: int, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(
            f"{section}.{name} must be a whole number of at least {low}, got {value!r}"
        )
