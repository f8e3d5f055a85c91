"""Runs parts of one section in a process of their own, which a fault of the device may take down, and says what it found.

    python3 tests/gpu/worker.py JOB      # JOB: JSON of `Job`; `check` starts it

Answers in lines of JSON on standard output: a part begins, its results, it ends. A device that is dead after a part ends the
process; whoever started it starts another for the rest. Whatever libraries print goes to standard error.
"""

import gc
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # for tests.*, which is not installed

from tests.gpu.results import Result
from tests.gpu.sections import SECTIONS
from tests.gpu.setting import Part, Setting

DEAD = 3  # exit status: the device answers no more


@dataclass(frozen=True)
class Job:
    """Which parts of which section, and what they are told."""

    section: str
    parts: list[str]
    setting: dict[str, Any]


def run(job: Job, out: TextIO) -> int:
    """Every part in turn; the exit status."""
    setting = Setting(**job.setting)
    parts: Mapping[str, Part] = SECTIONS[job.section].parts()
    for name in job.parts:
        say(out, part=name, event="begin")
        torch.manual_seed(0)
        for result in results_of(job.section, name, parts[name], setting):
            say(out, part=name, event="result", result=asdict(result))
        is_dead = not is_alive(setting)
        say(out, part=name, event="end")
        if is_dead:
            return DEAD
    return 0


def results_of(section: str, name: str, part: Part, setting: Setting) -> Iterator[Result]:
    """Of one part, as they come; an error in it is a failed result, of a peer one that is absent."""
    passed = False if SECTIONS[section].is_ours else None
    try:
        yield from part(setting)
    except NotImplementedError as problem:
        yield Result(f"{section}/{name}", passed, note=f"not there: {problem}")
    except Exception as problem:
        logging.exception("%s/%s", section, name)
        why = f"{type(problem).__name__}: {problem}".strip().splitlines()[0][:300]
        yield Result(f"{section}/{name}", passed, note=why)


def is_alive(setting: Setting) -> bool:
    """Whether the device still answers; gives back what the part has allocated."""
    if not setting.is_gpu:
        return True
    try:
        torch.cuda.synchronize()
        gc.collect()
        torch.cuda.empty_cache()
    except RuntimeError:
        logging.exception("the device answers no more")
        return False
    return True


def say(out: TextIO, **message: Any) -> None:
    """One line, at once."""
    out.write(json.dumps(message) + "\n")
    out.flush()


def main(argument: str) -> int:
    """As the file is called."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    job = Job(**json.loads(argument))
    if not SECTIONS[job.section].is_alone:
        # What torch.empty returns, outputs and scratch among it, holds NaN. Costs time: not for what is timed.
        torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(1)
    return run(job, out)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
