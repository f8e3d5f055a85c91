"""Vivace in process: the core that a server runs, stepped here.

usage: python -m vivace.bench.peers.with_vivace MODEL QUANTIZE CACHE_DIR THREADS [ISA]
"""

import sys
from dataclasses import replace
from pathlib import Path

from vivace.bench import job
from vivace.bench.peers.speak import Event, Prompts, serve
from vivace.engine import core
from vivace.engine.config import Config, CpuConfig, quantized_by


def main(model: str, quantize: str, cache_dir: str, threads: int, isa: str | None) -> None:
    """Load, then serve."""
    weights = replace(quantized_by(quantize), cache_dir=Path(cache_dir))
    config = Config(model=Path(model), cpu=CpuConfig(threads=threads, isa=isa), weights=weights)
    engine = core.load(config, _no_progress)

    def run(prompts: Prompts, tokens: int) -> tuple[float, list[Event]]:
        return job.run(engine, job.Job(tuple(map(tuple, prompts)), tokens))

    serve(run, version=f"vivace, weights {engine.info.weights}")


def _no_progress(_done: int, _total: int) -> None:
    """Nobody looks at it."""


if __name__ == "__main__":
    _, model, quantize, cache_dir, threads, *isa = sys.argv
    main(model, quantize, cache_dir, int(threads), isa[0] if isa else None)
