"""What is checked on a machine with a GPU, with the Python that is there: first that all is right, then how fast it is.

    PYTHONPATH=src python3 tests/gpu/check.py --results DIR [--sections conformance,bars,peers]

Needs torch, triton, transformers, tokenizers and safetensors, and the built C++ library. Sections run in processes of their
own: a fault of the device ends one part of one section. Writes DIR/gpu-check.json after every section, what workers say to
DIR/gpu-check.log, and ends with status 1 if anything failed, an op that is not there included. See docs/gpu-check.md.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # for tests.*, which is not installed

from tests.gpu.bars import beside_peers  # noqa: E402
from tests.gpu.crew import Crew, Deadline, slices  # noqa: E402
from tests.gpu.machine import clocks, compute_sanitizer, describe  # noqa: E402
from tests.gpu.results import Report, Result, line  # noqa: E402
from tests.gpu.sections import SECTIONS  # noqa: E402
from tests.gpu.setting import Setting  # noqa: E402
from tests.gpu.worker import Job  # noqa: E402

LIMIT_S = 480  # of all sections together: the library is built before, and all of it has 9 minutes
PATIENCE = 10  # of a rehearsal: kernels are interpreted
CHECKER = (  # what libraries ask of the driver and do not get is no error of a kernel
    *("--tool", "memcheck", "--error-exitcode", "9", "--print-limit", "5"),
    *("--report-api-errors", "no"),
)
Write = Callable[[str], Any]


class Check:
    """One run of the sections that are asked for."""

    def __init__(self, arguments: argparse.Namespace, write: Write) -> None:
        name = "gpu-check" if arguments.device != "cpu" else "gpu-check-rehearsal"
        is_rehearsal = arguments.device == "cpu"
        self.setting = Setting(arguments.device, arguments.backend, arguments.tiny)
        self.report = Report(
            arguments.results / f"{name}.json",
            describe(arguments.device),
            is_rehearsal=is_rehearsal,
        )
        self._start = time.perf_counter()
        self._deadline = Deadline(arguments.limit_s)
        patience = PATIENCE if is_rehearsal else 1
        self._crew = Crew(arguments.results / f"{name}.log", self._deadline, patience=patience)
        self._most_parts = arguments.parts
        self._jobs = arguments.jobs
        self._write = write

    def together(self, names: Sequence[str]) -> None:
        """Sections that may share the device: what is right is so beside others too."""
        start = time.perf_counter()

        def run(name: str, job: Job) -> tuple[list[Result], float]:
            found = self._crew.run(job, SECTIONS[name], _prefix(name))
            return found, time.perf_counter() - start

        with ThreadPoolExecutor(self._jobs) as pool:
            running = {
                name: [pool.submit(run, name, job) for job in self._jobs_of(name)] for name in names
            }
            for name, futures in running.items():
                ended = [future.result() for future in futures]
                found = [result for results, _ in ended for result in results]
                self._keep(name, found, max((at for _, at in ended), default=0.0))

    def alone(self, name: str) -> None:
        """A section that is timed."""
        start, before = time.perf_counter(), clocks(self.setting.device)
        found: list[Result] = []
        for job in self._jobs_of(name):
            found += self._crew.run(job, SECTIONS[name], [])
        seconds = time.perf_counter() - start
        self._keep(name, found, seconds, before=before, after=clocks(self.setting.device))
        if name == "ceilings":
            rates = {r.name.split("/")[1]: r.rate for r in found if r.passed and r.rate}
            self.setting = replace(self.setting, ceilings=rates)

    def _jobs_of(self, name: str) -> list[Job]:
        section = SECTIONS[name]
        if section.is_sanitized and (not self.setting.is_gpu or compute_sanitizer() is None):
            self._keep(name, [Result(name, None, note="not measured: no compute-sanitizer")], 0.0)
            return []
        parts = list(section.parts())[: self._most_parts]
        told = asdict(self.setting)
        return [Job(name, some, told) for some in slices(parts, section.num_workers)]

    def _keep(self, name: str, found: Iterable[Result], seconds: float, **more: Any) -> None:
        results = self.report.add(found)
        for result in results:
            self._write(line(result))
        if results:
            self._write(f"--    {name}: {seconds:.1f} s")
            self.report.sections[name] = {"seconds": round(seconds, 2), **more}
            self.report.write(is_complete=False)

    def finish(self, names: Sequence[str]) -> int:
        """Comparisons and the exit status."""
        if {"bars", "peers"} <= set(names):
            self._keep("beside", beside_peers(self.report.found), 0.0)
        self.report.write(is_complete=True)
        self._write(f"--    all: {time.perf_counter() - self._start:.1f} s")
        counts = [sum(r.passed is x for r in self.report.results) for x in (True, False, None)]
        self._write(
            "{} passed, {} failed, {} without a bar; see {}".format(*counts, self.report.path)
        )
        return 1 if self.report.failed else 0


def _prefix(name: str) -> list[str]:
    """The command that a section's workers run under."""
    checker = compute_sanitizer() if SECTIONS[name].is_sanitized else None
    if checker is None:
        return []
    return [checker, *CHECKER]


def chosen(names: str | None) -> list[str]:
    """Sections by name, in their order; bars and peers bring the ceilings that they are shares of."""
    wanted = set(names.split(",")) if names else set(SECTIONS)
    unknown = wanted - set(SECTIONS)
    if unknown:
        raise SystemExit(
            f"no section {', '.join(sorted(unknown))}: there are {', '.join(SECTIONS)}"
        )
    if wanted & {"bars", "peers"}:
        wanted.add("ceilings")
    return [name for name in SECTIONS if name in wanted]


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Checks on a machine with a GPU.")
    parser.add_argument("--results", type=Path, required=True, help="folder for gpu-check.json")
    parser.add_argument("--sections", help=f"some of {','.join(SECTIONS)}; unset: all")
    parser.add_argument("--device", default="cuda", help="torch device; cpu: a rehearsal")
    parser.add_argument("--backend", default="triton", help="reference: rehearse without kernels")
    parser.add_argument("--tiny", action="store_true", help="shapes for a rehearsal")
    parser.add_argument("--parts", type=int, help="no more parts of each section than this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes at a time")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="for all sections")
    arguments = parser.parse_args(words)
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu is a rehearsal: --tiny")
    return arguments


def main(words: Sequence[str] | None = None, write: Write = print) -> int:
    """Run, print and record everything; 1 if a check failed."""
    arguments = parse(words)
    names = chosen(arguments.sections)
    check = Check(arguments, write)
    shared = [name for name in names if not SECTIONS[name].is_alone]
    if shared:
        check.together(shared)
    for name in names:
        if SECTIONS[name].is_alone:
            check.alone(name)
    return check.finish(names)


if __name__ == "__main__":
    sys.exit(main())
