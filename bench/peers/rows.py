"""The comparison: which figures of which jobs, and in which pairs of engines, one after the other with probes around them.

In process is compared with in process, gRPC with HTTP. A pair is of one minute of one machine; ratios are taken pair by pair.
"""

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vivace.bench.cpu import highest
from vivace.bench.job import Job, Timing, random_job
from vivace.bench.peers.engines import ENGINES, Setting, started
from vivace.bench.result import Figure, figure
from vivace.bench.roofline import Step, Work, step_work
from vivace.engine.config import Config, quantized_by
from vivace.engine.models.hf_config import read_spec
from vivace.engine.plan import program_of
from vivace.kernels.cpu.library import Library
from vivace.kernels.cpu.probe import Peaks, probe

PROBE_REPEATS = 7

Found = dict[str, float]  # figures by name
Pair = tuple[str, str]  # ours, another


@dataclass(frozen=True, slots=True)
class Row:
    """One kind of measurement, of some pairs of engines."""

    measure: Callable[[str, Setting, int], Found]  # of one engine, with a seed
    pairs: tuple[Pair, ...]
    is_rate: frozenset[str] = frozenset()  # figures of which more is better
    quantize: str = "int8"
    steps: tuple[tuple[str, Step], ...] = ()  # by the figure that they bound
    is_of_later_starts: bool = False  # each engine is started once before it is measured


TTFT, ONE_RATE, MANY_RATE = "TTFT of 512, s", "decode at 512, tokens/s", "decode of 16, tokens/s"
ALONE = ((TTFT, Step(512, 1, 512, 256.5)), (ONE_RATE, Step(1, 1, 576, 576)))
TOGETHER = ((MANY_RATE, Step(16, 16, 192, 192)),)


def _one(name: str, at: Setting, seed: int) -> Found:
    found = _timed(name, at, random_job(seed, streams=1, prompt=512, tokens=129), warm_up=512)
    return {TTFT: found.ttft_s, ONE_RATE: found.decode_rate}


def _many(name: str, at: Setting, seed: int) -> Found:
    found = _timed(name, at, random_job(seed, streams=16, prompt=128, tokens=128), warm_up=128)
    return {MANY_RATE: found.decode_rate}


def _prefix(name: str, at: Setting, seed: int) -> Found:
    job = random_job(seed, streams=16, prompt=32, shared=512, tokens=32)
    return {"16 requests with a prefix, s": _timed(name, at, job, warm_up=64).wall_s}


def _launch(name: str, at: Setting, seed: int) -> Found:
    with started(name, at) as (engine, launched):
        engine.run(random_job(seed, streams=1, prompt=8, tokens=1))
        return {"launch to first token, s": time.perf_counter() - launched}


def _memory(name: str, at: Setting, seed: int) -> Found:
    with started(name, at) as (engine, _):
        peak = engine.peak_bytes(random_job(seed, streams=16, prompt=128, tokens=128))
    return {"peak memory, MB": peak / 1e6}


def _timed(name: str, at: Setting, job: Job, *, warm_up: int) -> Timing:
    """A job, after one of as many prompts of `warm_up` tokens: some engines do much at the first of a size."""
    with started(name, at) as (engine, _):
        engine.run(random_job(-1, streams=len(job.prompts), prompt=warm_up, tokens=8))
        return engine.run(job)


def _pairs(ours: str, *others: str) -> tuple[Pair, ...]:
    return tuple((ours, other) for other in others)


INSIDE = _pairs(
    "vivace int8", "openvino int8, batching", "openvino int8, PA", "openvino int8, SDPA"
)
SERVED = _pairs("vivace int8, gRPC", "llama-server Q8_0", "llama-server Q8_0, tuned", "vivace int8")
INT4 = _pairs(
    "vivace int4",
    *("openvino int4, batching", "openvino int4, PA", "openvino int4, SDPA", "onnxruntime int4"),
)
INT4_SERVED = _pairs("vivace int4, gRPC", "llama-server Q4_0", "llama-server Q4_0, tuned")
AVX2 = _pairs("vivace int8, AVX2", "vivace int8")
ROWS = {
    "one": Row(_one, INSIDE + SERVED + AVX2, frozenset({ONE_RATE}), steps=ALONE),
    "one-int4": Row(_one, INT4 + INT4_SERVED, frozenset({ONE_RATE}), "int4", steps=ALONE),
    "many": Row(_many, INSIDE[:1] + SERVED, frozenset({MANY_RATE}), steps=TOGETHER),
    "prefix": Row(
        _prefix,
        _pairs("vivace int8", "openvino int8, prefix") + _pairs("vivace int8, gRPC", "vllm bf16"),
    ),
    "launch": Row(
        _launch,
        _pairs("vivace int4", "llama-server Q4_0", "onnxruntime int4"),
        quantize="int4",
        is_of_later_starts=True,
    ),
    "memory": Row(
        _memory,
        _pairs("vivace int8, bf16 cache, gRPC", "llama-server Q8_0"),
        is_of_later_starts=True,
    ),
}


class Table:
    """Samples of all rounds."""

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, value: float) -> None:
        """One sample."""
        self._values[name].append(value)

    def add_pair(self, pair: Pair, both: tuple[Found, Found], is_rate: frozenset[str]) -> None:
        """What the engines of a pair did, and how many times as good ours is."""
        ours, other = pair
        for name, one in both[0].items():
            two = both[1][name]
            self.add(f"{ours}, {name} (beside {other})", one)
            self.add(f"{other}, {name}", two)
            what = name.rpartition(", ")[0]
            self.add(f"{what}: {ours} / {other}", one / two if name in is_rate else two / one)

    def figures(self) -> list[Figure]:
        """All that was added, in the order of the first samples."""
        return [figure(name, values) for name, values in self._values.items()]


def measure(
    at: Setting, *, rounds: int, rows: Sequence[str], without: Sequence[str]
) -> list[Figure]:
    """Every pair of every row, in rounds; the other engine goes first in every second one. Progress goes to stderr.

    Engines whose name begins with one of `without` are left out. Raises ConfigError before any is
    started if one is not prepared.
    """
    wanted = [
        (ROWS[name], pair)
        for name in rows
        for pair in ROWS[name].pairs
        if not any(one.startswith(word) for one in pair for word in without)
    ]
    for _, pair in wanted:
        for name in pair:
            ENGINES[name](at)
    works = {row.quantize: _works(at, row) for row, _ in wanted if row.steps}
    for name in dict.fromkeys(n for row, pair in wanted if row.is_of_later_starts for n in pair):
        _launch(name, at, seed=0)
    library = Library(threads=at.threads)
    table = Table()
    before = probe(library, repeats=PROBE_REPEATS)
    for index in range(rounds):
        for row, pair in wanted:
            order = pair if index % 2 == 0 else pair[::-1]
            found = {name: row.measure(name, at, index + 1) for name in order}
            after = probe(library, repeats=PROBE_REPEATS)
            peaks = highest([before, after])
            before = after
            table.add("read bandwidth, GB/s", peaks.read / 1e9)
            if peaks.int8 is not None:
                table.add("int8 peak, GOP/s", peaks.int8 / 1e9)
            table.add_pair(pair, (found[pair[0]], found[pair[1]]), row.is_rate)
            for name, step in row.steps:
                value = found[pair[0]][name]
                seconds = step.requests / value if name in row.is_rate else value
                limit, share = _share(works[row.quantize][name], seconds, peaks)
                table.add(f"{pair[0]}, {name.rpartition(', ')[0]}, % of {limit}", share)
            print(f"round {index + 1}, {peaks.read / 1e9:.1f} GB/s: {found}", file=sys.stderr)
    return table.figures()


def _works(at: Setting, row: Row) -> dict[str, Work]:
    """What each step of the rows of a width must read and compute."""
    config = Config(model=at.model, weights=quantized_by(row.quantize))
    program = program_of(config, read_spec(at.model))
    return {name: step_work(program.calls, step) for name, step in (*ALONE, *TOGETHER)}


def _share(work: Work, seconds: float, peaks: Peaks) -> tuple[str, float]:
    """The limit that is nearest, and what was reached of it, in percent."""
    bounds = work.bounds(peaks)
    limit = max(bounds, key=lambda key: bounds[key])
    return limit, bounds[limit] / seconds * 100
