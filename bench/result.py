"""What every measurement records beside its figures, and how figures are summed up."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median, quantiles


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured quantity: median and spread of its repeats. The unit ends the name."""

    name: str
    median: float
    p5: float
    p95: float
    repeats: int


def figure(name: str, values: Sequence[float]) -> Figure:
    """Sum up repeats of one quantity."""
    cuts = quantiles(values, n=20, method="inclusive") if len(values) > 1 else [values[0]] * 19
    return Figure(name, median(values), cuts[0], cuts[-1], len(values))


def report(command: str, figures: Sequence[Figure], config: Mapping[str, str | int]) -> None:
    """Print a table for people, then one JSON line for machines."""
    for one in figures:
        print(
            f"{one.name:44s}{one.median:12.4g}   p5 {one.p5:.4g}, p95 {one.p95:.4g}, n {one.repeats}"
        )
    record = {
        "command": command,
        "config": dict(config),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain")),
        "machine": {
            "cpu": _cpu(),
            "cpus": len(os.sched_getaffinity(0)),
            "system": platform.platform(),
            "python": platform.python_version(),
        },
        "figures": [asdict(one) for one in figures],
    }
    print(json.dumps(record))


def _git(*words: str) -> str:
    """Empty outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=False)
    return run.stdout.strip()


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "")
