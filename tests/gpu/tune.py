"""Measures the candidates of every op on the GPU that is there, and writes the best to `kernels/tuned/<device>.json`.

    PYTHONPATH=src python3 tests/gpu/tune.py [--dry-run] [--model NAME ...]

An op has candidates if its triton.py has a table CANDIDATES: configs by the bucket (or the op) that it hands to
`Launcher.config`. What is timed is what the shipped models call, each shape for itself, in a CUDA graph, on copies of the
arguments that together do not fit the L2 cache; the best candidate of a bucket has the least mean of its times, each
as a share of the default's. One that gives other numbers than the default is dropped, and said so.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import triton

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # for tests.*, which is not installed

from vivace.engine import warm_up  # noqa: E402
from vivace.engine.config import CacheConfig, KvDType  # noqa: E402
from vivace.engine.gpu_kernels import Model, read_models, shipped  # noqa: E402
from vivace.kernels.backend import NO_OPS, Ops, bind_triton  # noqa: E402
from vivace.kernels.gpu import ahead, tuned  # noqa: E402
from vivace.kernels.gpu.launcher import Config, Launcher  # noqa: E402

BLOCK_TOKENS = 64
CONTEXT = 8192  # tokens of each request that decodes
STEPS = [  # tokens of each request: what serving does most
    *([1] * num_requests for num_requests in (1, 8, 64)),
    *([num_tokens] for num_tokens in (512, 2048)),
]
KV_BYTES = 8 << 30
MIN_BYTES = 256 << 20  # that the copies of a call's arguments have in all: more than any L2
MAX_COPIES = 64
REPEATS = 20
TOLERANCE = 2e-2  # of the largest number: another order of additions in bf16 products


@dataclass(frozen=True)
class Call:
    """What a step asked of an op."""

    field: str  # of Ops
    args: tuple
    attrs: Mapping

    @property
    def shapes(self) -> str:
        """What tells it from other calls of the op."""
        tensors = (one for one in self.args if isinstance(one, torch.Tensor))
        return " ".join("x".join(map(str, one.shape)) for one in tensors)


class Recording:
    """Ops that note, for each (op, bucket) whose config they use, its default and a call of each shape."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.calls: dict[tuple[str, str], dict[str, Call]] = {}  # by key, then by shapes
        self.defaults: dict[tuple[str, str], Config] = {}
        self._given: dict[tuple[str, str], Config] = {}
        self._used: list[tuple[str, str]] = []
        launcher.config, launcher.launch = self._config, self._launch

    def ops(self) -> Ops:
        """All ops of the launcher, recorded."""
        names = [one.name for one in fields(Ops) if one.name not in NO_OPS]
        with_triton = [name for name in names if find_spec(f"vivace.kernels.{name}.triton")]
        recorded = {name: self._recorded(name) for name in with_triton}
        return replace(bind_triton(self.launcher), **recorded)

    def _recorded(self, name: str) -> Callable[..., None]:
        run = module_of(name).bind(self.launcher)

        def run_and_note(*args, **attrs) -> None:
            self._used = []
            run(*args, **attrs)
            call = Call(name, args, attrs)
            for key in self._used:
                self.calls.setdefault(key, {})[call.shapes] = call

        return run_and_note

    def _config(self, op: str, bucket: str, default: Config) -> Config:
        """Asked for while an op is bound, or each time that it runs; of its own identity."""
        key = op, bucket
        self._used.append(key)
        self.defaults.setdefault(key, default)
        if key not in self._given:
            self._given[key] = replace(Launcher.config(self.launcher, op, bucket, default))
        return self._given[key]

    def _launch(self, kernel, grid, args, constexprs, config) -> None:
        self._used += [key for key, given in self._given.items() if given is config]
        Launcher.launch(self.launcher, kernel, grid, args, constexprs, config)


class RandomMemory:
    """A device's memory where weights, which come without numbers, are random."""

    def __init__(self, memory, device: torch.device) -> None:
        self._memory, self._device = memory, device

    def __getattr__(self, name: str):
        return getattr(self._memory, name)

    def upload(self, array):
        """Weights of a dry run have no strides."""
        if array.size < 2 or any(array.strides):
            return self._memory.upload(array)
        kind = torch.bfloat16 if array.dtype == np.uint16 else torch.float32
        return torch.randn(array.shape, dtype=kind, device=self._device).mul_(0.02)


def module_of(field: str):
    """The Triton side of an op."""
    return import_module(f"vivace.kernels.{field}.triton")


def candidates_of(field: str, key: tuple[str, str]) -> list[Config]:
    """What there is to try beside the default."""
    table = getattr(module_of(field), "CANDIDATES", {})
    return list(table.get(key[1]) or table.get(key[0]) or ())


def run_steps(model: Model, recording: Recording) -> None:
    """Run a model, with random weights, at the sizes that matter."""
    ops = recording.ops()
    device = recording.launcher.device
    if device.type != "meta":
        ops = replace(ops, memory=RandomMemory(ops.memory, device))
    bound = model.bind(ops)
    rng = np.random.default_rng(0)
    for query_lens in STEPS:
        inputs = warm_up.step_inputs(query_lens, CONTEXT // BLOCK_TOKENS, len(query_lens))
        num_requests, columns = inputs["block_tables"].shape
        inputs["tokens"] = rng.integers(0, 1000, sum(query_lens), np.int32)  # to many experts
        blocks = np.arange(num_requests * columns, dtype=np.int32)
        inputs["block_tables"] = rng.permutation(blocks).reshape(num_requests, columns)
        if max(query_lens) == 1:
            inputs["context_lens"] = np.full(num_requests, CONTEXT, np.int32)
        logits, _ = bound.runner.step(inputs)
        warm_up.draw(bound.sampler, logits, len(query_lens), 0)


def copies_of(call: Call) -> list[Call]:
    """The call on copies of its tensors, as many as do not fit the cache; a large one is not copied."""
    tensors = [one for one in call.args if isinstance(one, torch.Tensor)]
    small = [one for one in tensors if one.nbytes < MIN_BYTES]
    count = min(MAX_COPIES, 1 + MIN_BYTES // max(1, sum(one.nbytes for one in tensors)))
    copied = {id(one) for one in small}
    return [
        replace(call, args=tuple(one.clone() if id(one) in copied else one for one in call.args))
        for _ in range(count)
    ]


def measure(run: Callable[..., None], copies: list[Call]) -> float:
    """Microseconds of one call, in a CUDA graph of all copies."""
    for call in copies[:2]:
        run(*call.args, **call.attrs)  # compiles, and makes scratch
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in copies:
            run(*call.args, **call.attrs)
    times = []
    for _ in range(REPEATS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / len(copies))
    return statistics.median(times)


def differs(call: Call, first: Callable[..., None], second: Callable[..., None]) -> bool:
    """Whether two ways of running an op give other numbers in any of its tensors."""
    results = []
    for run in (first, second):
        [one] = copies_of(call)[:1]
        run(*one.args, **one.attrs)
        results.append([x.float() for x in one.args if isinstance(x, torch.Tensor)])
    return any(
        float((a - b).abs().max()) > TOLERANCE * max(float(a.abs().max()), 1e-30)
        for a, b in zip(*results, strict=True)
        if a.numel()
    )


def tuned_of(
    launcher: Launcher, key: tuple[str, str], calls: list[Call], default: Config
) -> Config:
    """The best of the candidates and the default."""
    [field] = {call.field for call in calls}

    def bound(config: Config) -> Callable[..., None]:
        launcher.configs[key] = config
        return module_of(field).bind(launcher)

    copies = [copies_of(call) for call in calls]
    base = [measure(bound(default), one) for one in copies]
    print(f"  {' '.join(f'{us:.1f}' for us in base)} us: {default}, the default")
    best, best_share = default, 1.0
    for config in candidates_of(field, key):
        try:
            if any(differs(call, bound(default), bound(config)) for call in calls):
                print(f"  {config}: gives other numbers")
                continue
            times = [measure(bound(config), one) for one in copies]
        except (triton.runtime.errors.OutOfResources, triton.CompilationError) as error:
            print(f"  {config}: {str(error).splitlines()[0]}")
            continue
        print(f"  {' '.join(f'{us:.1f}' for us in times)} us: {config}", flush=True)
        share = statistics.geometric_mean(a / b for a, b in zip(times, base, strict=True))
        if share < best_share:
            best, best_share = config, share
    launcher.configs[key] = default
    return best


def record(names: list[str], launcher: Launcher) -> Recording:
    """What the models ask of the ops."""
    recording = Recording(launcher)
    for name in names:
        [model] = read_models(name, CacheConfig(dtype=KvDType.BF16, block_tokens=BLOCK_TOKENS))
        cache = replace(model.config.cache, memory_bytes=KV_BYTES)
        run_steps(replace(model, config=replace(model.config, cache=cache)), recording)
    return recording


def main() -> int:
    """Tune and write, or say what would be."""
    parser = argparse.ArgumentParser(description="Tune kernels on the GPU that is there.")
    parser.add_argument("--model", nargs="+", choices=shipped(), default=list(shipped()))
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured")
    parser.add_argument("--out", type=Path, default=tuned.FOLDER)
    args = parser.parse_args()
    if args.dry_run:
        with ahead.listing("sm_90") as launcher:
            recording = record(args.model, launcher)
    else:
        launcher = Launcher("cuda")
        recording = record(args.model, launcher)
    del launcher.config, launcher.launch  # those that record
    configs: dict[str, dict[str, Config]] = {}
    for key, by_shapes in sorted(recording.calls.items()):
        op, bucket = key
        calls = list(by_shapes.values())
        count = len(candidates_of(calls[0].field, key))
        print(f"{op} {bucket}: {count} candidates, {len(calls)} shapes", flush=True)
        if count and not args.dry_run:
            best = tuned_of(launcher, key, calls, recording.defaults[key])
            configs.setdefault(op, {})[bucket] = best
    if not args.dry_run:
        device = torch.cuda.get_device_name()
        print("written to", tuned.write(device, triton.__version__, configs, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
