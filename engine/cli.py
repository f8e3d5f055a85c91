"""`vivace info`: what a checkpoint is, and what it would take to serve it."""

import argparse
from pathlib import Path

from vivace.engine.config import Config
from vivace.engine.errors import ArtifactError
from vivace.engine.models.decoder import emit
from vivace.engine.models.generation_config import read_generation_defaults
from vivace.engine.models.hf_config import read_spec
from vivace.engine.plan import kv_token_bytes, make_plan, num_parameters, read_machine


def main(command: str, argv: list[str]) -> int:
    """Run one of this folder's commands; returns the exit status."""
    assert command == "info"
    parser = argparse.ArgumentParser(
        prog="vivace info", description="Say what a checkpoint is and what it takes to serve it."
    )
    parser.add_argument("model", type=Path, help="a folder with config.json and *.safetensors")
    return _info(parser.parse_args(argv).model)


def _info(model: Path) -> int:
    if not model.is_dir():
        raise ArtifactError(f"{model} is not a folder")
    spec = read_spec(model)
    program = emit(spec)
    machine = read_machine()
    plan = make_plan(Config(model=model), spec, program, machine)
    attention = spec.layers[0].attention
    rows = {
        "architecture": f"{spec.architecture} (supported)",
        "parameters": f"{num_parameters(program):,}",
        "layers": f"{len(spec.layers)}, model size {spec.model_size}",
        "heads": f"{attention.num_heads} query, {attention.num_kv_heads} key-value, of {attention.head_dim}",
        "vocabulary": f"{spec.vocab_size:,}",
        "context": f"{spec.max_context_tokens:,} tokens",
        "end tokens": ", ".join(map(str, read_generation_defaults(model).eos_token_ids)) or "none",
        "weights": f"{plan.weight_bytes / 2**20:.1f} MiB in fp32",
        "KV cache": f"{kv_token_bytes(spec):,} bytes per token in fp32",
        "planned here": f"{plan.num_blocks} blocks ({plan.kv_bytes / 2**20:.1f} MiB), "
        f"{plan.arena_bytes / 2**20:.1f} MiB working memory, {plan.threads} threads",
    }
    for name, value in rows.items():
        print(f"{name:14s}{value}")
    return 0
