"""How near the engine is to what the machine can do: every op, and whole steps, as shares of bandwidth and peaks.

Ops are timed inside the step that they are part of, where weights come from memory as they do in service. The probes run
before and after every round, and the higher value counts for it: a neighbour on the machine and its clock only ever take
away, and memory of some machines is twice as fast in one minute as in the next.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from vivace.bench.job import Job, Timing, random_job, run, timing
from vivace.bench.result import Figure, figure
from vivace.bench.roofline import Step, Work, step_work, work_of
from vivace.engine import core
from vivace.engine.config import Config
from vivace.engine.models.hf_config import read_spec
from vivace.engine.models.program import Call, Kind, Program
from vivace.engine.plan import program_of, read_machine
from vivace.kernels.backend import Ops
from vivace.kernels.cpu.library import Library
from vivace.kernels.cpu.probe import Peaks, probe
from vivace.kernels.recorder import Recorder, Replay

LAYER = re.compile(r"\.\d+\.")
Times = list[tuple[str, float]]  # of the ops of a step, in order


@dataclass(frozen=True, slots=True)
class Load:
    """How much is run."""

    rounds: int = 5
    prompt: int = 512  # of one stream
    tokens: int = 128
    streams: int = 16
    own: int = 128  # prompt of each of those
    probes: int = 7  # repeats of each


class Profiler:
    """A recorder whose replays keep how long each op took, by the sizes of the step, while `is_on`."""

    def __init__(self) -> None:
        self.is_on = False
        self.steps: dict[tuple[int, ...], list[Times]] = defaultdict(list)
        self._recorder: Recorder | None = None
        self._replay: Replay | None = None

    def adapt(self, ops: Ops) -> Ops:
        """Put this in the place of the recorder."""
        self._recorder = ops.recorder
        return replace(ops, recorder=self)

    def record(self, call_ops: Callable[[Sequence[int]], None], most: Sequence[int]) -> Replay:
        """See `kernels.recorder.Recorder`."""
        assert self._recorder is not None
        self._replay = self._recorder.record(call_ops, most)
        return self

    def run(self, sizes: Sequence[int], then: Callable[[], None] | None = None) -> None:
        """See `kernels.recorder.Replay`."""
        assert self._replay is not None
        if self.is_on:
            self.profile(sizes, then)
        else:
            self._replay.run(sizes, then)

    def profile(self, sizes: Sequence[int], then: Callable[[], None] | None = None) -> Times:
        """See `kernels.recorder.Replay`."""
        assert self._replay is not None
        times = self._replay.profile(sizes, then)
        self.steps[tuple(sizes)].append(times)
        return times


def measure(config: Config, load: Load) -> list[Figure]:
    """Peaks, the whole model, and each op."""
    threads = config.cpu.threads or read_machine().num_cpus
    library = Library(threads=threads, isa=config.cpu.isa)
    profiler = Profiler()
    engine = core.load(config, _no_progress, profiler.adapt)
    program = program_of(config, read_spec(config.model))
    _timed(engine, _one(load, seed=0))  # whatever is done once is done
    probes = [probe(library, repeats=load.probes)]
    alone, together = [], []
    for seed in range(1, load.rounds + 1):
        alone.append(_timed(engine, _one(load, seed)))
        together.append(_timed(engine, _many(load, seed)))
        probes.append(probe(library, repeats=load.probes))
    profiler.is_on = True
    for job in (_one(load, seed=-1), _many(load, seed=-1)):
        _timed(engine, job)
    probes.append(probe(library, repeats=load.probes))
    peaks = [highest(two) for two in pairwise(probes)]
    measured = {
        f"prefill of {load.prompt}": [one.ttft_s for one in alone],
        f"decode at {load.prompt}": [1 / one.decode_rate for one in alone],
        f"decode of {load.streams}": [load.streams / one.decode_rate for one in together],
    }
    kinds = dict(zip(measured, _steps(load), strict=True))
    figures = _peak_figures(probes)
    for name, step in kinds.items():
        figures += _whole(name, measured[name], step_work(program.calls, step), peaks[:-1])
    for name, step in kinds.items():
        sizes = (step.tokens, step.requests, step.requests, step.requests, 0)
        figures += op_figures(name, program, step, profiler.steps[sizes], peaks[-1])
    return figures


def highest(probes: Sequence[Peaks]) -> Peaks:
    """The best of each."""

    def best(values: Sequence[float | None]) -> float | None:
        return max((value for value in values if value is not None), default=None)

    fp32 = max(one.fp32 for one in probes)
    int8, bf16 = best([one.int8 for one in probes]), best([one.bf16 for one in probes])
    return Peaks(max(one.read for one in probes), fp32, int8, bf16)


def op_figures(
    name: str, program: Program, step: Step, times: Sequence[Times], peaks: Peaks
) -> list[Figure]:
    """Of a kind of step: what each op takes of it, and its share of the limit that it is nearest to."""
    spent: dict[str, list[float]] = {}
    work: dict[str, Work] = {}
    for place, (op, _) in enumerate(times[0]):
        call = program.calls[place] if place < len(program.calls) else None
        label = op if call is None else _label(call)
        seconds = [one[place][1] for one in times]
        spent[label] = [
            a + b for a, b in zip(spent.get(label, [0.0] * len(times)), seconds, strict=True)
        ]
        if call is not None:
            assert call.op == op
            work[label] = work.get(label, Work()) + work_of(call, step)
    figures = []
    for label, values in sorted(spent.items(), key=lambda item: -median(item[1])):
        figures.append(figure(f"{name}, {label}, us", [value * 1e6 for value in values]))
        if label in work:
            bounds = work[label].bounds(peaks)
            limit = max(bounds, key=lambda key: bounds[key])
            shares = [bounds[limit] / value * 100 for value in values]
            figures.append(figure(f"{name}, {label}, % of {limit}", shares))
    return figures


def _label(call: Call) -> str:
    """The op, and of projections which: the same in every layer."""
    names = [value.name for value in call.ins if value.kind is Kind.WEIGHT]
    return f"{call.op} {LAYER.sub('.', names[0])}" if "linear" in call.op else call.op


def _whole(name: str, seconds: Sequence[float], work: Work, peaks: Sequence[Peaks]) -> list[Figure]:
    """`peaks` of each round."""
    figures = [figure(f"{name}, ms", [value * 1e3 for value in seconds])]
    bounds = [work.bounds(one) for one in peaks]
    for limit in bounds[0]:
        if bounds[0][limit]:
            shares = [
                bound[limit] / value * 100 for bound, value in zip(bounds, seconds, strict=True)
            ]
            figures.append(figure(f"{name}, % of {limit}", shares))
    return figures


def _peak_figures(probes: Sequence[Peaks]) -> list[Figure]:
    figures = [figure("read bandwidth, GB/s", [one.read / 1e9 for one in probes])]
    figures.append(figure("fp32 peak, GFLOP/s", [one.fp32 / 1e9 for one in probes]))
    for what in ("int8", "bf16"):
        values = [value / 1e9 for one in probes if (value := getattr(one, what)) is not None]
        if values:
            figures.append(figure(f"{what} peak, GOP/s", values))
    return figures


def _steps(load: Load) -> tuple[Step, Step, Step]:
    """Prefill, then decoding of one stream and of many: their context is that of the middle."""
    alone, own = load.prompt + load.tokens / 2, load.own + load.tokens / 2
    return (
        Step(load.prompt, 1, context=load.prompt, visible=(load.prompt + 1) / 2),
        Step(1, 1, context=alone, visible=alone),
        Step(load.streams, load.streams, context=own, visible=own),
    )


def _one(load: Load, seed: int) -> Job:
    return random_job(seed, streams=1, prompt=load.prompt, tokens=load.tokens + 1)


def _many(load: Load, seed: int) -> Job:
    return random_job(seed, streams=load.streams, prompt=load.own, tokens=load.tokens)


def _timed(engine: core.EngineCore, job: Job) -> Timing:
    start, events = run(engine, job)
    return timing(start, events, job)


def _no_progress(_done: int, _total: int) -> None:
    """Loading is not what is measured."""
