"""Runs jobs in worker processes: one that dies or hangs loses the part that it was at, and another goes on with the rest."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from tests.gpu.results import Result
from tests.gpu.sections import Section
from tests.gpu.worker import Job

WORKER = Path(__file__).with_name("worker.py")
START_S = (
    90  # until a worker begins its first part: it imports torch, slowly under the memory checker
)
OUT_OF_TIME = "not run: out of time"
REFUSAL = "Device not supported"  # of compute-sanitizer, in some virtual machines
MAX_WORKERS = 6  # that a job may use up


class Deadline:
    """When everything must have ended."""

    def __init__(self, limit_s: float) -> None:
        self.at = time.monotonic() + limit_s

    def sooner(self, limit_s: float) -> "Deadline":
        """This one, or so long from now if that is before it."""
        other = Deadline(limit_s)
        return other if other.at < self.at else self

    @property
    def left_s(self) -> float:
        """Seconds until then, at least 0."""
        return max(0.0, self.at - time.monotonic())


@dataclass
class Progress:
    """What a worker has said so far; `at` is the part that it is at."""

    results: list[Result]
    done: list[str]
    at: str | None = None


class Crew:
    """Workers of one check. `run` may be called from several threads."""

    def __init__(
        self, log: Path, deadline: Deadline, *, patience: float = 1, worker: Path = WORKER
    ) -> None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
        self._log = log
        self._deadline = deadline
        self._worker = worker
        self._patience = patience  # by which limits are multiplied

    def run(self, job: Job, section: Section, prefix: Sequence[str]) -> list[Result]:
        """All parts of a job: its results, and a failed one for every part that gave none."""
        found: list[Result] = []
        left, ending = list(job.parts), ""
        deadline = self._deadline.sooner(section.limit_s * self._patience)
        for _ in range(MAX_WORKERS):
            if not left or deadline.left_s <= 0:
                break
            progress, ending = self._one_worker(replace(job, parts=left), section, prefix, deadline)
            found += progress.results
            left = [part for part in left if part not in progress.done]
            if progress.at is not None:
                found.append(_failed(job, section, progress.at, ending))
                left.remove(progress.at)
            elif not progress.done:
                break
            if prefix:
                return _without_refusal(found)
        why = OUT_OF_TIME if deadline.left_s <= 0 else f"not run: before it, {ending}"
        return found + [_failed(job, section, part, why) for part in left]

    def _one_worker(
        self, job: Job, section: Section, prefix: Sequence[str], deadline: Deadline
    ) -> tuple[Progress, str]:
        """Until it ends or is ended; how it did, in words."""
        command = [*prefix, sys.executable, str(self._worker), json.dumps(asdict(job))]
        environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        if not str(job.setting["device"]).startswith("cuda"):
            environment["TRITON_INTERPRET"] = "1"
        if prefix:  # allocations of their own, so that the checker sees where each ends
            environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        lines: queue.Queue[str | None] = queue.Queue()
        with (
            self._log.open("a") as log,
            subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=environment,
                start_new_session=True,  # so that it can be ended with all that it started
            ) as worker,
        ):
            assert worker.stdout is not None
            pump = threading.Thread(target=_pump, args=(worker.stdout, lines, log), daemon=True)
            pump.start()
            try:
                progress, ending = self._follow(lines, section, deadline)
                if not ending:
                    worker.wait()
            finally:
                if worker.poll() is None:
                    os.killpg(worker.pid, signal.SIGKILL)
            status = worker.wait()
            pump.join()
        if prefix and not ending:
            progress.results.append(_verdict(job, status, self._log))
        return progress, ending or f"a process ended with status {status}; see {self._log.name}"

    def _follow(
        self, lines: "queue.Queue[str | None]", section: Section, deadline: Deadline
    ) -> tuple[Progress, str]:
        """Read what a worker says; why it must be ended, or nothing if it ended."""
        progress = Progress([], [])
        part_s = section.part_limit_s * self._patience
        limit_s = START_S * self._patience + part_s
        until = time.monotonic() + limit_s
        while True:
            wait_s = min(until - time.monotonic(), deadline.left_s)
            try:
                said = lines.get(timeout=max(0.0, wait_s))
            except queue.Empty:
                is_over = deadline.left_s <= 0
                return progress, OUT_OF_TIME if is_over else f"took more than {limit_s:.0f} s"
            if said is None:
                return progress, ""
            if _note(json.loads(said), progress):
                limit_s = part_s
                until = time.monotonic() + limit_s


def _note(message: dict[str, Any], progress: Progress) -> bool:
    """Take down one message; whether the clock starts anew."""
    match message["event"]:
        case "begin":
            progress.at = message["part"]
        case "result":
            progress.results.append(Result(**message["result"]))
        case "end":
            progress.done.append(message["part"])
            progress.at = None
    return message["event"] != "result"


def slices(parts: Sequence[str], count: int) -> list[list[str]]:
    """Parts dealt to at most so many workers."""
    return [some for i in range(count) if (some := list(parts[i::count]))]


def _failed(job: Job, section: Section, part: str, why: str) -> Result:
    return Result(f"{job.section}/{part}", False if section.is_ours else None, note=why)


def _pump(stream: TextIO, lines: "queue.Queue[str | None]", log: TextIO) -> None:
    """Hand on what a worker says, and that it says no more; the memory checker talks on the same stream."""
    for text in stream:
        if text.startswith('{"part"') and text.endswith(
            "\n"
        ):  # whole: a process may die at any point
            lines.put(text)
        else:
            log.write(text)
    lines.put(None)


def _verdict(job: Job, status: int, log: Path) -> Result:
    """What the memory checker found."""
    if REFUSAL in log.read_text(errors="replace"):
        return Result(job.section, None, note="not measured: the device refuses compute-sanitizer")
    note = "" if status == 0 else f"status {status}; see {log.name}"
    return Result(f"{job.section}/no error in memory", status == 0, note=note)


def _without_refusal(found: list[Result]) -> list[Result]:
    """Of a machine whose device the checker refuses, nothing else counts."""
    return [result for result in found if result.passed is None][:1] or found
