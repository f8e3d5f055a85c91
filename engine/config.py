"""Every setting of the system, in one frozen tree, each with its meaning and its range.

Built once at start-up, by `engine/config_file.py` or in Python; wrong values and bad combinations are refused here.
Nothing is read from the environment and nothing changes afterwards. Values worked out from the model or the machine
(number of blocks, threads) are not settings: they live in `engine/plan.py`.
"""

import ipaddress
import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar, get_args

from vivace.engine.errors import ConfigError
from vivace.engine.models.quantize import Quantize
from vivace.kernels.backend import Backend
from vivace.kernels.quantized import GROUPS

Kind = TypeVar("Kind", bound=Enum)

INT32 = 2**31 - 1  # what gRPC's own settings hold
MAX_NAME_CHARS = 128


def setting(default: Any, about: str, *, low: float = 1, high: float = math.inf) -> Any:
    """A field of the tree. `about` says what it means, and what unset means where None is the default."""
    return field(default=default, metadata={"about": about, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """How work is batched, in each model's engine."""

    max_step_tokens: int = setting(
        512, "tokens per forward pass: more is throughput, fewer is latency"
    )
    max_running: int = setting(64, "requests computed at a time, which hold cache blocks")
    max_waiting: int = setting(1024, "requests queued beyond those; further ones are refused")

    def __post_init__(self) -> None:
        _check("scheduler.", self)
        if self.max_step_tokens < self.max_running:
            raise ConfigError(
                f"scheduler.max_step_tokens ({self.max_step_tokens}) must be at least "
                f"scheduler.max_running ({self.max_running}): each decodes one token a step"
            )


class KvDType(Enum):
    """What keys and values are kept in."""

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"  # a scale for each token and KV head


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheConfig:
    """The paged KV cache, of each model."""

    dtype: KvDType | None = field(
        default=None,
        metadata={
            "about": "what keys and values are kept in: fp32, bf16 or int8; unset: fp32, or with "
            "backend 'triton' what the weights are kept in"
        },
    )
    block_tokens: int | None = setting(
        None,
        "tokens per block, which is also the grain of prefix sharing; unset: 16, or with backend "
        "'triton' 64",
    )
    memory_bytes: int | None = setting(
        None,
        "memory of a model's cache, such as 512MiB; unset: min(1 GiB, its share of a quarter of "
        "the free memory), or on a GPU half of what the weights leave",
    )
    prefix_sharing: bool = setting(True, "find prompts' blocks that an earlier request computed")
    verify_hits: bool = setting(
        False,
        "for debugging: compare the tokens of blocks that are found, which their digests stand for; "
        "a prompt's host memory then grows with the square of its length",
    )

    def __post_init__(self) -> None:
        _check("cache.", self)


@dataclass(frozen=True, kw_only=True, slots=True)
class CpuConfig:
    """The C++ backend."""

    threads: int | None = setting(
        None,
        "threads of a model's engine; unset: its share of the CPUs this process may use",
        high=1024,
    )
    isa: str | None = setting(None, "instruction set; unset: the best the CPU has")

    def __post_init__(self) -> None:
        _check("cpu.", self)


@dataclass(frozen=True, kw_only=True, slots=True)
class GpuConfig:
    """The Triton backend."""

    kernel_cache_dir: Path | None = field(
        default=None,
        metadata={
            "about": "folder of compiled kernels, as `vivace kernels build` fills it; unset: Triton's own, "
            "and the first start compiles"
        },
    )
    strict_jit: bool = setting(
        False,
        "make it an error, not a warning, if a kernel is compiled, or scratch grows, after the start",
    )

    def __post_init__(self) -> None:
        _check("gpu.", self)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsConfig:
    """What becomes of a checkpoint's weights."""

    quantize: Quantize = field(
        default=Quantize.NONE,
        metadata={"about": "round weights when they are loaded: int8 or int4 (output layer int8)"},
    )
    group: int = setting(128, "inputs that share a scale in int4: 32, 64 or 128")
    cache_dir: Path | None = field(
        default=None,
        metadata={
            "about": "folder that keeps what was quantized for the next start, which then takes a "
            "fraction of the time; unset: none"
        },
    )

    def __post_init__(self) -> None:
        _check("weights.", self)
        if self.group not in GROUPS:
            raise ConfigError(f"weights.group must be 32, 64 or 128, got {self.group}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseConfig:
    """Block-sparse decode. A request's own `sparse` goes before the first three."""

    budget_tokens: int | None = setting(
        None,
        "tokens of its context that a decoding token attends to, for requests that do not say: 2048 "
        "where long contexts must be fast and most of their text is beside the point; unset: all",
    )
    min_context: int = setting(
        8192,
        "contexts under that stay dense: lower where even they are slow, higher where they must be exact",
        low=0,
    )
    layers_dense: int = setting(
        2,
        "first layers that stay dense, whose attention is spread; more where quality falls, 0 for speed",
        low=0,
    )
    min_kept_mass: float = setting(
        0.5,
        "share of attention that the selection must keep, where it is measured, or the request is "
        "dense from there on: 0.9 for texts that must not suffer, 0 to measure alone",
        low=0,
        high=1,
    )
    measure_every: int = setting(
        32,
        "tokens from one that is measured to the next: fewer see a loss sooner, and measuring one "
        "costs half of what dense attention does",
    )

    def __post_init__(self) -> None:
        _check("sparse.", self)


def quantized_by(word: str | None) -> WeightsConfig:
    """The weights' settings, with a word for one of them. Raises ConfigError for a word that is none."""
    return WeightsConfig(quantize=_one_of(Quantize, "quantize", word or "none"))


def kept_in(word: str | None) -> CacheConfig:
    """The cache's settings, with a word for its type. Raises ConfigError for a word that is none."""
    return CacheConfig(dtype=None if word is None else _one_of(KvDType, "kv_cache_dtype", word))


def _one_of(kind: type[Kind], name: str, word: str) -> Kind:
    words = [one.value for one in kind]
    if word not in words:
        raise ConfigError(f"{name} must be one of {', '.join(words)}, got {word!r}")
    return kind(word)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerConfig:
    """The port, and what clients may ask of it."""

    host: str = setting("127.0.0.1", "IP address to listen on")
    port: int = setting(50051, "port to listen on; 0: any that is free", low=0, high=65535)
    insecure: bool = setting(
        False, "allow an address off loopback, where anybody on the network can call"
    )
    drain_s: float = setting(
        30.0, "seconds that requests have to finish after a signal to stop", low=0
    )
    stalled_reader_s: float = setting(
        30.0, "seconds that a stream's client may read nothing before it is cut", low=0.001
    )
    max_message_bytes: int = setting(4 << 20, "largest request, such as 4MiB", low=1024, high=INT32)
    max_metadata_bytes: int = setting(
        16 << 10, "most metadata (headers) of a request", low=1024, high=INT32
    )
    max_concurrent_streams: int = setting(
        4096,
        "calls that one connection may have open; its client holds back the others",
        high=INT32,
    )

    def __post_init__(self) -> None:
        _check("server.", self)
        if not self.is_loopback and not self.insecure:
            raise ConfigError(
                f"server.host {self.host} can be reached from the network, without encryption or "
                "authentication; use a loopback address, or set server.insecure (--insecure) if "
                "that is meant"
            )

    @property
    def address(self) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
        """The host as a number. Raises ConfigError if it is none."""
        try:
            return ipaddress.ip_address("127.0.0.1" if self.host == "localhost" else self.host)
        except ValueError as error:
            raise ConfigError(f"server.host must be an IP address, got {self.host!r}") from error

    @property
    def is_loopback(self) -> bool:
        """Whether this machine alone can connect."""
        return self.address.is_loopback


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """One engine's part of the tree, and its model."""

    model: Path
    backend: Backend | None = None
    device: str = "cpu"
    max_context_tokens: int | None = None
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    cpu: CpuConfig = field(default_factory=CpuConfig)
    gpu: GpuConfig = field(default_factory=GpuConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)

    @property
    def runs_on(self) -> Backend:
        """The backend that is set, or that of the device."""
        return _backend_of(self.backend, self.device)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    """The root of the tree: all that a server needs to know. Its models have everything but the folder in common."""

    backend: Backend | None = field(
        default=None,
        metadata={
            "about": "cpu: the C++ library; triton: kernels for a GPU; reference: plain torch, slow; "
            "unset: cpu, or triton where the device is a GPU"
        },
    )
    device: str = setting("cpu", "cpu, or a GPU as torch names it, such as cuda or cuda:1")
    max_context_tokens: int | None = setting(
        None, "tokens of prompt and reply together; unset: the model's own", low=2
    )
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    cpu: CpuConfig = field(default_factory=CpuConfig)
    gpu: GpuConfig = field(default_factory=GpuConfig)
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    sparse: SparseConfig = field(default_factory=SparseConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    models: Mapping[str, Path] = field(default_factory=dict)  # by the name that clients know

    def __post_init__(self) -> None:
        _check("", self)
        check_backend(self)
        for name, folder in self.models.items():
            if not (0 < len(name) <= MAX_NAME_CHARS and name.isprintable()):
                raise ConfigError(
                    f"models: a name must have 1..{MAX_NAME_CHARS} printable characters, got {name!r}"
                )
            if not isinstance(folder, Path):
                raise ConfigError(f"models.{name} must be the path of a folder, got {folder!r}")

    def engine(self, name: str) -> Config:
        """What the engine of one model is told."""
        return Config(
            model=self.models[name],
            backend=self.backend,
            device=self.device,
            max_context_tokens=self.max_context_tokens,
            scheduler=self.scheduler,
            cache=self.cache,
            cpu=self.cpu,
            gpu=self.gpu,
            weights=self.weights,
            sparse=self.sparse,
        )


def allowed(one: Field[Any]) -> str:
    """What a setting may be, for people."""
    kind = one.type
    if (choices := choices_of(one)) is not None:
        return " or ".join(repr(member.value) for member in choices)
    if kind is bool:
        return "true or false"
    if kind in (str, str | None):
        return "a text"
    if kind == Path | None:
        return "the path of a folder"
    noun = "a number" if kind is float else "a whole number"
    if one.name.endswith("_bytes"):
        noun += " (of bytes, or such as '512MiB')"
    low, high = one.metadata["low"], one.metadata["high"]
    return f"{noun} of at least {low:g}" if high == math.inf else f"{noun} in {low:g}..{high:d}"


def choices_of(one: Field[Any]) -> type[Enum] | None:
    """What a setting that is one of several words, or unset, chooses from; None for all others."""
    kinds = [one.type, *get_args(one.type)]
    return next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Enum)), None)


def _backend_of(backend: Backend | None, device: str) -> Backend:
    if backend is not None:
        return backend
    return Backend.CPU if device == "cpu" else Backend.TRITON


def check_backend(config: ServeConfig | Config) -> None:
    """Raise ConfigError for settings of another backend than the one that would run."""
    backend, weights = _backend_of(config.backend, config.device), config.weights
    if backend is Backend.CPU and config.device != "cpu":
        raise ConfigError(
            f"device must be 'cpu' with backend 'cpu', got {config.device!r}; "
            "backends 'triton' and 'reference' run on others"
        )
    if backend is not Backend.CPU and weights.cache_dir is not None:
        raise ConfigError(
            f"weights.cache_dir is of backend 'cpu', got {weights.cache_dir} with backend "
            f"{backend.value!r}"
        )
    if backend is not Backend.CPU and config.cpu != CpuConfig():
        raise ConfigError(f"cpu.threads and cpu.isa are of backend 'cpu', got {config.cpu}")
    if backend is not Backend.TRITON and config.gpu != GpuConfig():
        raise ConfigError(f"gpu.* is of backend 'triton', got {config.gpu}")
    if backend is Backend.TRITON and weights.quantize is not Quantize.NONE:
        raise ConfigError(
            f"weights.quantize must be 'none' with backend 'triton', got {weights.quantize.value!r}"
        )


def _check(prefix: str, config: Any) -> None:
    """Raise ConfigError for a value of another type or out of its range."""
    for one in fields(config):
        value = getattr(config, one.name)
        if "about" in one.metadata and one.name != "models" and not _fits(one, value):
            raise ConfigError(f"{prefix}{one.name} must be {allowed(one)}, got {value!r}")


def _fits(one: Field[Any], value: Any) -> bool:
    if value is None:
        return one.default is None
    if (choices := choices_of(one)) is not None:
        return isinstance(value, choices)
    if one.type == Path | None:
        return isinstance(value, Path)
    if one.type in (int, int | None, float):
        kinds = (int, float) if one.type is float else (int,)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        return math.isfinite(value) and one.metadata["low"] <= value <= one.metadata["high"]
    return isinstance(value, one.type if isinstance(one.type, type) else str)
