"""What a check has to say, as a line for people and as JSON for machines, and the file that keeps it.

A figure is a time and what follows from it; `passed` is None where there is nothing to pass: a figure without a bar, a
peer, something that this machine does not have. Refuses to keep a time that no device took.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

TIMES = ("us", "p5_us", "p95_us", "tokens_per_s", "rate", "share")


@dataclass(frozen=True)
class Result:
    """One line of the table."""

    name: str
    passed: bool | None
    error: float | None = None  # relative
    us: float | None = None  # of one call, median; the spread is between replays
    p5_us: float | None = None
    p95_us: float | None = None
    tokens_per_s: float | None = None
    rate: float | None = None  # bytes/s or flop/s
    share: float | None = None  # of what `of` names
    of: str = ""  # "copy", "product": ceilings of this run; "dense": own dense op; "us": the time
    bar: float | None = None
    goal: float | None = None
    note: str = ""


def without_times(result: Result) -> Result:
    """What is left of a figure where nothing was timed."""
    if all(getattr(result, name) is None for name in TIMES):
        return result
    blank: dict[str, Any] = dict.fromkeys(TIMES)
    if result.note.startswith("wrong"):
        return replace(result, **blank)
    return replace(result, **blank, passed=None, note="rehearsed, not measured")


def _writable(result: Result) -> Result:
    """JSON has no infinity."""
    if result.error is None or math.isfinite(result.error):
        return result
    return replace(result, error=None, note=f"error {result.error}. {result.note}".strip())


def line(result: Result) -> str:
    """For a table."""
    mark = {True: "ok  ", False: "FAIL", None: "  - "}[result.passed]
    parts = [f"{mark}  {result.name:<58}"]
    if result.us is not None:
        parts.append(f"{result.us:10.2f} us ({result.p5_us:.2f}-{result.p95_us:.2f})")
    if result.tokens_per_s is not None:
        parts.append(f"{result.tokens_per_s:,.0f} tokens/s")
    if result.rate is not None:
        parts.append(f"{result.rate / 1e12:.3f} T/s")
    if result.share is not None:
        parts.append(f"{result.share:.3g} of {result.of}")
    if result.bar is not None:
        parts.append(f"[bar {result.bar:g}, goal {result.goal:g}]")
    if result.error is not None:
        parts.append(f"error {result.error:.1e}")
    return "  ".join((*parts, result.note)).rstrip()


class Report:
    """The JSON file, written whole after every section: a crash keeps what was found before."""

    def __init__(self, path: Path, machine: Mapping[str, Any], *, is_rehearsal: bool) -> None:
        self.path = path
        self.sections: dict[str, dict[str, Any]] = {}
        self.results: list[Result] = []  # as they are kept
        self.found: list[Result] = []  # as they came
        self._is_rehearsal = is_rehearsal
        self._machine = dict(machine)

    def add(self, results: Iterable[Result]) -> list[Result]:
        """Keep these; returns them as they are kept."""
        results = list(results)
        self.found += results
        results = [_writable(result) for result in results]
        kept = [without_times(r) if self._is_rehearsal else r for r in results]
        self.results += kept
        return kept

    @property
    def failed(self) -> list[str]:
        """Names of what did not pass."""
        return [result.name for result in self.results if result.passed is False]

    def write(self, *, is_complete: bool) -> None:
        """All so far."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = self._machine | {
            "is_rehearsal": self._is_rehearsal,  # on a CPU: no time in it, nothing about a device
            "is_complete": is_complete,
            "sections": self.sections,
            "results": [asdict(result) for result in self.results],
        }
        self.path.write_text(json.dumps(record, indent=2, allow_nan=False, default=str) + "\n")
