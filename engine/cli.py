"""`vivace info`: what a checkpoint is, whether it can be served, and what that takes. `vivace config`: all settings.
`vivace kernels`: which GPU kernels a model needs; compiles and judges them without a GPU."""

import argparse
import sys
from collections import Counter
from math import prod
from pathlib import Path

from vivace.engine.config import CacheConfig, Config, kept_in, quantized_by
from vivace.engine.config_file import add_flag, add_flags, from_words, to_toml
from vivace.engine.errors import ArtifactError, ConfigError, printable
from vivace.engine.models import weights
from vivace.engine.models.generation_config import read_generation_defaults
from vivace.engine.models.hf_config import architecture_name, read_spec
from vivace.engine.models.json_fields import read_fields
from vivace.engine.models.program import Program
from vivace.engine.models.spec import ModelSpec, MoeSpec
from vivace.engine.plan import (
    Plan,
    kv_dtype_of,
    kv_token_bytes,
    make_plan,
    mib,
    num_active_parameters,
    num_parameters,
    program_of,
    read_machine,
)
from vivace.engine.share import plan_all, plan_one, share

KERNELS = {  # of `vivace kernels`
    "build": "compile what serving a model needs into a folder, where it finds it",
    "list": "print every variant and the GPUs it is compiled for",
    "check": "compile and judge the machine code: no spills, within the chip's limits, instructions as meant",
}


def main(command: str, argv: list[str]) -> int:
    """Run one of this folder's commands; returns the exit status."""
    return {"info": _info, "config": _config, "kernels": _kernels}[command](argv)


def _kernels(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vivace kernels",
        description="GPU kernels, compiled ahead of time on a machine that needs no GPU. A MODEL is a "
        "folder with a config.json, or the name of a shipped one; its weights are not read. "
        "check exits with 1 if machine code is not as it must be.",
    )
    kinds = parser.add_subparsers(dest="kind", required=True)
    for kind, about in KERNELS.items():
        one = kinds.add_parser(kind, help=about, description=about)
        one.add_argument("model", nargs=None if kind == "build" else "?", metavar="MODEL")
        one.add_argument("--target", required=kind != "list", metavar="GPU", help="such as sm_90")
        one.add_argument("--block-tokens", type=int, help="as served (unset: 64)")
        about = "as served: fp32, bf16 or int8 (unset: what the weights are kept in)"
        one.add_argument("--kv-cache-dtype", help=about)
        if kind == "build":
            one.add_argument("--cache-dir", type=Path, required=True, help="what serving is told")
            one.add_argument("--device", help="use what was tuned on it, such as 'NVIDIA H200'")
    args = parser.parse_args(argv)
    try:
        from vivace.engine import gpu_kernels
        from vivace.kernels.gpu.target import TARGETS
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error}; install vivace[gpu]") from error
    if args.target not in (None, *TARGETS):
        raise ConfigError(f"--target must be one of {', '.join(TARGETS)}, got {args.target!r}")
    dtype = kept_in(args.kv_cache_dtype).dtype
    cache = CacheConfig(dtype=dtype, block_tokens=args.block_tokens)
    models = gpu_kernels.read_models(args.model, cache)
    match args.kind:
        case "list":
            return gpu_kernels.show(models, [args.target] if args.target else [*TARGETS])
        case "check":
            return gpu_kernels.check(models, args.target)
    return gpu_kernels.build(models, args.target, args.cache_dir, args.device)


def _config(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vivace config",
        description="Print all settings as TOML, which `vivace serve --config FILE` reads back, and what this machine "
        "makes of each MODEL. Takes the flags of `vivace serve`. Exits with 1 if a MODEL cannot be served.",
    )
    add_flags(parser)
    config = from_words(parser.parse_intermixed_args(argv))
    machine = read_machine(config.device)
    engines = share({name: config.engine(name) for name in config.models}, machine)
    remarks, problems = {}, []
    for name, engine in engines.items():
        try:
            remarks[name] = _remarks(engine, plan_one(name, engine, machine))
        except (ArtifactError, ConfigError) as error:
            problems.append(error)
            remarks[name] = [f"cannot be served: {printable(str(error))}"]
    print(to_toml(config, remarks), end="")
    if not problems:
        plan_all(engines, machine)
    for problem in problems:
        print(f"vivace: error: {problem}", file=sys.stderr)
    return int(bool(problems))


def _remarks(config: Config, plan: Plan) -> list[str]:
    return [
        f"plan: {plan.threads} threads, context {plan.max_context_tokens:,} tokens",
        f"KV cache {mib(plan.kv_bytes)}: {plan.num_blocks:,} blocks of {plan.block_tokens} tokens "
        f"in {plan.kv_dtype.value}",
        f"weights {plan.weight_kinds}; working memory {mib(plan.arena_bytes)}",
    ]


def _info(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="vivace info",
        description="Say what a checkpoint is and what it takes to serve it. "
        "Exits with 1 if it cannot be served.",
    )
    parser.add_argument("model", type=Path, help="a folder with config.json and *.safetensors")
    add_flag(parser, "quantize")
    add_flag(parser, "kv-cache-dtype")
    args = parser.parse_args(argv)
    model = args.model
    weights_config, cache = quantized_by(args.quantize), kept_in(args.kv_cache_dtype)
    config = Config(model=model, weights=weights_config, cache=cache)
    if not model.is_dir():
        raise ArtifactError(f"{model} is not a folder")
    rows = {
        "architecture": printable(architecture_name(read_fields(model / "config.json"))),
        "supported": "no",
    }
    try:
        spec = read_spec(model)
        rows["supported"] = "yes"
        program = program_of(config, spec)
        rows |= _model_rows(config, spec, program)
        end_tokens = ", ".join(map(str, read_generation_defaults(model).eos_token_ids))
        rows["end tokens"] = end_tokens or "none"
        weights.check(model, program, spec.architecture)
        rows |= _plan_rows(config, spec, program)
    except (ArtifactError, ConfigError) as error:
        rows |= _file_rows(model) | {"problem": str(error)}
    for name, value in rows.items():
        print(f"{name:14s}{value}")
    return int("problem" in rows)


def _model_rows(config: Config, spec: ModelSpec, program: Program) -> dict[str, str]:
    attention = spec.layers[0].attention
    total, active = num_parameters(program), num_active_parameters(program, spec)
    rows = {
        "parameters": f"{total:,}"
        + (f", {active:,} of them for a token" if active < total else ""),
        "layers": f"{len(spec.layers)}, model size {spec.model_size}",
        "heads": f"{attention.num_heads} query, {attention.num_kv_heads} key-value, of {attention.head_dim}",
    }
    windows = Counter(layer.attention.window for layer in spec.layers)
    if windows.keys() != {None}:
        rows["windows"] = ", ".join(
            f"{'none' if size is None else f'{size:,} tokens'} in {count} of {len(spec.layers)} layers"
            for size, count in windows.items()
        )
    sparse = [layer.mlp for layer in spec.layers if isinstance(layer.mlp, MoeSpec)]
    if sparse:
        moe = sparse[0]
        shared = f", one of {moe.shared.hidden_size} for all" if moe.shared else ""
        rows["experts"] = (
            f"{moe.num_experts} of {moe.hidden_size}, {moe.top_k} a token{shared}, "
            f"in {len(sparse)} of {len(spec.layers)} layers"
        )
    return rows | {
        "vocabulary": f"{spec.vocab_size:,}",
        "context": f"{spec.max_context_tokens:,} tokens",
        "KV cache": f"{kv_token_bytes(program):,} bytes per token in {kv_dtype_of(program).value}",
    }


def _plan_rows(config: Config, spec: ModelSpec, program: Program) -> dict[str, str]:
    plan = make_plan(config, spec, program, read_machine())
    needed = plan.weight_bytes + plan.arena_bytes + plan.kv_bytes
    return {
        "memory": f"{_mib(needed)}: weights {_mib(plan.weight_bytes)}, working memory "
        f"{_mib(plan.arena_bytes)}, KV cache {_mib(plan.kv_bytes)} ({plan.num_blocks} blocks)",
        "weights": plan.weight_kinds,
        "threads": f"{plan.threads}",
    }


def _file_rows(model: Path) -> dict[str, str]:
    """What the tensors' headers say of a checkpoint that cannot be served."""
    try:
        tensors = weights.open_checkpoint(model).values()
    except ArtifactError:
        return {}
    count = sum(prod(tensor.shape) for tensor in tensors)
    num_bytes = sum(tensor.num_bytes for tensor in tensors)
    dtypes = ", ".join(sorted({tensor.dtype for tensor in tensors}))
    return {"tensors": f"{len(tensors)} with {count:,} numbers in {_mib(num_bytes)} ({dtypes})"}


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"
