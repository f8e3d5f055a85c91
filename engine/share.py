"""Several engines on one machine: what each may take, so that no two count on the same memory or CPU.

An engine that is alone plans with all that is free. Engines that load beside each other would all see the same memory
as free; so their parent divides it before any of them starts.
"""

from collections.abc import Mapping
from dataclasses import replace

from vivace.engine.config import Config
from vivace.engine.errors import ArtifactError, ConfigError
from vivace.engine.models.hf_config import read_spec
from vivace.engine.plan import Machine, Plan, default_kv_bytes, make_plan, mib, program_of
from vivace.kernels.backend import Backend


def share(configs: Mapping[str, Config], machine: Machine) -> dict[str, Config]:
    """The configs of engines that run side by side: unset threads and cache memory become an equal part of what one
    engine alone would take. One config stays as it is.
    """
    if len(configs) <= 1:
        return dict(configs)
    part = replace(
        machine,
        num_cpus=max(1, machine.num_cpus // len(configs)),
        free_bytes=machine.free_bytes // len(configs),
    )
    return {name: _made_explicit(config, part) for name, config in configs.items()}


def plan_all(configs: Mapping[str, Config], machine: Machine) -> dict[str, Plan]:
    """What the engines of `share`'s configs will plan. Reads no weight.

    Raises ConfigError or ArtifactError naming the model that cannot run, ConfigError if they do not fit together.
    """
    plans = {name: plan_one(name, config, machine) for name, config in configs.items()}
    needs = {
        name: plan.weight_bytes + plan.arena_bytes + plan.kv_bytes for name, plan in plans.items()
    }
    if (needed := sum(needs.values())) > machine.free_bytes:
        parts = ", ".join(f"{name} {mib(need)}" for name, need in needs.items())
        raise ConfigError(
            f"not enough memory: weights, KV cache and working memory of all models ({parts}) "
            f"need {mib(needed)}, {mib(machine.free_bytes)} is free"
        )
    return plans


def plan_one(name: str, config: Config, machine: Machine) -> Plan:
    """What the engine of one config will plan. Raises ConfigError or ArtifactError naming the model."""
    try:
        spec = read_spec(config.model)
        return make_plan(config, spec, program_of(config, spec), machine)
    except (ArtifactError, ConfigError) as error:
        raise type(error)(f"model {name!r}: {error}") from error


def _made_explicit(config: Config, part: Machine) -> Config:
    cache, cpu = config.cache, config.cpu
    if cache.memory_bytes is None:
        cache = replace(cache, memory_bytes=default_kv_bytes(part))
    if cpu.threads is None and config.runs_on is Backend.CPU:
        cpu = replace(cpu, threads=part.num_cpus)
    return replace(config, cache=cache, cpu=cpu)
