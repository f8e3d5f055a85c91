"""What every engine's process says and hears: a line of JSON for each job, and one for what became of it.

Imports nothing beyond Python: it runs in the environment of another engine, too.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Sequence

MARK = "@ "  # engines print lines of their own

Prompts = Sequence[Sequence[int]]
Event = tuple[int, float, int]  # prompt, when, number of tokens
Run = Callable[[Prompts, int], tuple[float, list[Event]]]  # when it began, and what came


def serve(run: Run, *, version: str, process: int | None = None) -> None:
    """Do jobs until there are no more. `process` is the one whose memory counts, with its children; unset: this one."""
    say({"version": version, "process": process or os.getpid()})
    for line in sys.stdin:
        job = json.loads(line)
        start, events = run(job["prompts"], job["tokens"])
        say({"start": start, "events": events})


def say(answer: dict[str, object]) -> None:
    """Print a line for who started this."""
    print(MARK + json.dumps(answer), flush=True)


def now() -> float:
    """Seconds; only differences within a process mean anything."""
    return time.perf_counter()
