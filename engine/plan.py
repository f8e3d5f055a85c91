"""What follows from config, model and machine: threads, number of blocks, context. Computed once, then fixed.

Refuses, before a weight is read, what cannot fit.
"""

import os
from dataclasses import dataclass
from math import prod
from pathlib import Path

from vivace.engine.config import Config
from vivace.engine.errors import ConfigError
from vivace.engine.events import SparseLimits
from vivace.engine.models.decoder import emit
from vivace.engine.models.fuse import fuse
from vivace.engine.models.program import Kind, Program, Symbol, sized, values_of, weight_bytes
from vivace.engine.models.quantize import Quantize, quantize
from vivace.engine.models.spec import ModelSpec, MoeSpec
from vivace.engine.models.weights import as_stored
from vivace.engine.runner import BYTES, arena_bytes, meta_shape
from vivace.engine.scheduler import MAX_PROMPT_LOGPROB_ROWS
from vivace.engine.sparse import MAX_META_UNITS, sparse_limits
from vivace.kernels.backend import Backend, free_bytes
from vivace.kernels.buffer import DType, kv_head_bytes

MAX_DEFAULT_KV_BYTES = 1 << 30  # on a CPU
BLOCK_TOKENS = {Backend.TRITON: 64}  # where the setting is unset
OTHER_BLOCK_TOKENS = 16
FP32_BYTES = 4
MEMORY_FILES = {  # of a cgroup, by controller: its limit, and what is used of it
    "": ("memory.max", "memory.current"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes"),
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What this process may use."""

    num_cpus: int
    free_bytes: int  # of the memory that holds weights and cache
    is_gpu: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """Decided once, at start-up."""

    threads: int
    block_tokens: int
    kv_dtype: DType
    max_context_tokens: int  # prompt and reply together
    max_blocks: int  # of one request
    num_blocks: int
    kv_bytes: int
    weight_bytes: int
    weight_kinds: str  # how much is kept in which type
    arena_bytes: int
    max_rows: int
    most: dict[Symbol, int]  # the largest step
    sparse: SparseLimits | None


def read_machine(device: str = "cpu") -> Machine:
    """CPUs by affinity and cgroup quota; memory that is free, by the kernel and by the cgroup, or that of the GPU.

    Raises ConfigError if there is no such GPU, or no torch to ask it.
    """
    cpus = len(os.sched_getaffinity(0))
    quotas = [_words(group / "cpu.max") for group in _cgroups("")]
    for group in _cgroups("cpu"):
        quotas.append([*_words(group / "cpu.cfs_quota_us"), *_words(group / "cpu.cfs_period_us")])
    for quota in quotas:
        if len(quota) == 2 and quota[0] not in ("max", "-1"):
            cpus = min(cpus, max(1, int(quota[0]) // int(quota[1])))
    free = _meminfo_available()
    for controller, (limit_file, used_file) in MEMORY_FILES.items():
        for group in _cgroups(controller):
            limit, used = _words(group / limit_file), _words(group / used_file)
            if limit and used and limit[0] != "max":
                free = min(free, max(0, int(limit[0]) - int(used[0]) + _file_bytes(group)))
    if device == "cpu":
        return Machine(num_cpus=cpus, free_bytes=free)
    try:
        return Machine(num_cpus=cpus, free_bytes=free_bytes(device), is_gpu=True)
    except (ImportError, ValueError) as error:
        raise ConfigError(str(error)) from error


def program_of(config: Config, spec: ModelSpec) -> Program:
    """What the engine of this config runs."""
    kv_dtype = DType.FP32 if config.cache.dtype is None else DType(config.cache.dtype.value)
    plain = emit(spec, kv_dtype, block_tokens_of(config))
    if config.weights.quantize is not Quantize.NONE:
        return quantize(plain, config.weights.quantize, config.weights.group)
    stored = as_stored(config.model, plain, spec.architecture)
    if config.runs_on is not Backend.TRITON:
        return stored
    if config.cache.dtype is None and weight_dtype(config, stored) == DType.BF16.value:
        stored = as_stored(
            config.model, emit(spec, DType.BF16, block_tokens_of(config)), spec.architecture
        )
    return fuse(stored)


def block_tokens_of(config: Config) -> int:
    """The setting, or what suits the backend."""
    return config.cache.block_tokens or BLOCK_TOKENS.get(config.runs_on, OTHER_BLOCK_TOKENS)


def make_plan(config: Config, spec: ModelSpec, program: Program, machine: Machine) -> Plan:
    """Raises ConfigError if the model, its cache and its working memory do not fit."""
    weights = config.weights
    if weights.cache_dir is not None and weights.quantize is Quantize.NONE:
        raise ConfigError(
            f"weights.cache_dir ({weights.cache_dir}) keeps quantized weights; set weights.quantize"
        )
    context = config.max_context_tokens or spec.max_context_tokens
    if not 2 <= context <= spec.max_context_tokens:
        raise ConfigError(
            f"max_context_tokens must be in 2..{spec.max_context_tokens}, the model's own, got {context}"
        )
    scheduler = config.scheduler
    block_tokens = block_tokens_of(config)
    max_rows = scheduler.max_running + MAX_PROMPT_LOGPROB_ROWS
    most = {
        Symbol.T: scheduler.max_step_tokens,
        Symbol.B: scheduler.max_running,
        Symbol.B1: scheduler.max_running + 1,
        Symbol.P: scheduler.max_step_tokens,
        Symbol.R: max_rows,
        Symbol.X: -(-context // block_tokens),
        Symbol.U: MAX_META_UNITS,
    }
    all_weight_bytes = num_weight_bytes(program)
    work_bytes = arena_bytes(program, most) + FP32_BYTES * max_rows * spec.vocab_size
    block_bytes = kv_token_bytes(program) * block_tokens + meta_bytes(program, block_tokens)
    kv_bytes = config.cache.memory_bytes
    if kv_bytes is None:
        kv_bytes = default_kv_bytes(machine, taken=all_weight_bytes + work_bytes)
    needed = all_weight_bytes + work_bytes + kv_bytes
    if needed > machine.free_bytes:
        raise ConfigError(
            f"not enough memory: weights {mib(all_weight_bytes)}, KV cache {mib(kv_bytes)} and working "
            f"memory {mib(work_bytes)} need {mib(needed)}, {mib(machine.free_bytes)} is free; "
            "cache.memory_bytes says what the cache takes"
        )
    num_blocks = kv_bytes // block_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"cache.memory_bytes ({kv_bytes}) must hold at least one block of {block_bytes} bytes"
        )
    context = min(context, num_blocks * block_tokens)
    return Plan(
        threads=config.cpu.threads or machine.num_cpus,
        block_tokens=block_tokens,
        kv_dtype=kv_dtype_of(program),
        max_context_tokens=context,
        max_blocks=-(-context // block_tokens),
        num_blocks=num_blocks,
        kv_bytes=num_blocks * block_bytes,
        weight_bytes=all_weight_bytes,
        weight_kinds=weight_kinds(program),
        arena_bytes=work_bytes,
        max_rows=max_rows,
        most=most,
        sparse=sparse_limits(config, spec, block_tokens),
    )


def default_kv_bytes(machine: Machine, taken: int = 0) -> int:
    """Of the cache, where no setting says it: on a GPU, half of what is left beside what is taken, for kernels need scratch."""
    if machine.is_gpu:
        return max(0, machine.free_bytes - taken) // 2
    return min(MAX_DEFAULT_KV_BYTES, machine.free_bytes // 4)


def num_parameters(program: Program) -> int:
    """Numbers in the weights; tied ones count once."""
    weights = (value for value in values_of(program) if value.kind is Kind.WEIGHT)
    return sum(prod(sized(value.shape, {})) for value in weights)


def num_weight_bytes(program: Program) -> int:
    """Of the weights as they are kept; tied ones count once."""
    weights = dict.fromkeys(v for v in values_of(program) if v.kind is Kind.WEIGHT)
    return sum(map(weight_bytes, weights))


def weight_kinds(program: Program) -> str:
    """How much is kept in which type, the most first."""
    found: dict[str, int] = {}
    for value in dict.fromkeys(v for v in values_of(program) if v.kind is Kind.WEIGHT):
        groups = "" if value.group is None else f" in groups of {value.group}"
        kind = value.dtype.value + groups
        found[kind] = found.get(kind, 0) + weight_bytes(value)
    kinds = sorted(found, key=lambda kind: -found[kind])
    return ", ".join(f"{kind} {found[kind] / 2**20:,.1f} MiB" for kind in kinds)


def weight_dtype(config: Config, program: Program) -> str:
    """What most matrices are kept in, in a word."""
    kinds = {value.dtype for value in values_of(program) if value.kind is Kind.WEIGHT}
    plain = DType.BF16 if DType.BF16 in kinds else DType.FP32
    kind = config.weights.quantize
    word: str = plain.value if kind is Quantize.NONE else kind.value
    return word


def num_active_parameters(program: Program, spec: ModelSpec) -> int:
    """Numbers in the weights that a token meets: of each layer's experts, those it is sent to."""
    idle = 0
    for layer in spec.layers:
        if isinstance(moe := layer.mlp, MoeSpec):
            matrices = 3 * moe.hidden_size * spec.model_size
            biases = 2 * moe.hidden_size + spec.model_size if moe.expert_bias else 0
            idle += (moe.num_experts - moe.top_k) * (matrices + biases)
    return num_parameters(program) - idle


def kv_dtype_of(program: Program) -> DType:
    """What keys and values are kept in, by all layers alike."""
    return next(value.dtype for value in values_of(program) if value.kind is Kind.CACHE)


def kv_token_bytes(program: Program) -> int:
    """Bytes of KV cache that one token takes, over all layers."""
    caches = (value for value in values_of(program) if value.kind is Kind.CACHE)
    return sum(
        2 * G * kv_head_bytes(D, cache.dtype)
        for cache in caches
        for G, D in [sized(cache.shape, {})]
    )


def meta_bytes(program: Program, block_tokens: int) -> int:
    """Bytes of what selection knows of one block, over all layers."""
    return sum(
        BYTES[value.dtype] * prod(meta_shape(value, 1, block_tokens))
        for value in values_of(program)
        if value.kind is Kind.META
    )


def mib(num_bytes: int) -> str:
    """Bytes, for people."""
    return f"{num_bytes / 2**20:,.0f} MiB"


def _meminfo_available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise ConfigError("/proc/meminfo does not say how much memory is available")


def _cgroups(controller: str) -> list[Path]:
    """This process's cgroup and those above it, whose limits hold too. Version 2 has one tree, of controller "", version 1 a
    tree for each; in a container the path may be the host's, and then the root is the container's own group."""
    root = Path("/sys/fs/cgroup", controller)
    for line in _lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            group = root / path.lstrip("/")
            return [group, *(p for p in group.parents if p.is_relative_to(root))]
    return []


def _file_bytes(group: Path) -> int:
    """Of a cgroup's memory and that of those below it, pages of files, which the kernel takes back before it runs short."""
    stat = dict(line.split() for line in _lines(group / "memory.stat"))
    of_all = "total_" if "total_active_file" in stat else ""  # version 1 has both
    return sum(int(stat.get(of_all + name, 0)) for name in ("active_file", "inactive_file"))


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    """A file of the kernel's, which is not there on every system."""
    return path.read_text().splitlines() if path.is_file() else []
