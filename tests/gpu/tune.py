"""Measures the candidates of every op on the GPU that is there, and writes the best to `kernels/tuned/<device>.json`.

    PYTHONPATH=src python3 tests/gpu/tune.py [--dry-run] [--model NAME ...]

An op has candidates if its triton.py has a table CANDIDATES: configs by the bucket (or the op) that it hands to
`Launcher.config`. What is timed is what a model calls, in a CUDA graph, on copies of its arguments that together do not
fit the L2 cache. A candidate that gives other numbers than the default is dropped, and said so.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
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


class Recording:
    """Ops that note the last call for each (op, bucket) that they ask a config for, with the default of it."""

    def __init__(self, launcher: Launcher) -> None:
        self.calls: dict[tuple[str, str], Call] = {}
        self.defaults: dict[tuple[str, str], Config] = {}
        self._launcher = launcher
        self._asked: list[tuple[str, str]] = []

    def ops(self) -> Ops:
        """All ops of the launcher, recorded."""
        plain = bind_triton(self._launcher)
        names = [one.name for one in fields(Ops) if one.name not in NO_OPS]
        with_triton = [name for name in names if find_spec(f"vivace.kernels.{name}.triton")]
        return replace(plain, **{name: self._recorded(name) for name in with_triton})

    def _recorded(self, name: str) -> Callable[..., None]:
        at_bind: list[tuple[str, str]] = []
        config = Launcher.config

        def note(op: str, bucket: str, default: Config) -> Config:
            self._asked.append((op, bucket))
            self.defaults.setdefault((op, bucket), default)
            return config(self._launcher, op, bucket, default)

        self._launcher.config = note
        self._asked = at_bind
        run = module_of(name).bind(self._launcher)

        def run_and_note(*args, **attrs) -> None:
            self._asked = list(at_bind)
            run(*args, **attrs)
            for key in self._asked:
                self.calls[key] = Call(name, args, attrs)

        return run_and_note


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


def calls_of(model: Model, launcher: Launcher) -> Recording:
    """What a model's steps ask of the ops."""
    recording = Recording(launcher)
    ops = recording.ops()
    if launcher.device.type != "meta":
        ops = replace(ops, memory=RandomMemory(ops.memory, launcher.device))
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
    return recording


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


def tuned_of(launcher: Launcher, key: tuple[str, str], call: Call, default: Config) -> Config:
    """The fastest of the candidates and the default."""

    def bound(config: Config) -> Callable[..., None]:
        launcher.configs[key] = config
        return module_of(call.field).bind(launcher)

    copies = copies_of(call)
    best, best_us = default, measure(bound(default), copies)
    print(f"  {default}: {best_us:.1f} us, the default")
    for config in candidates_of(call.field, key):
        try:
            if differs(call, bound(default), bound(config)):
                print(f"  {config}: gives other numbers")
                continue
            us = measure(bound(config), copies)
        except (triton.runtime.errors.OutOfResources, triton.CompilationError) as error:
            print(f"  {config}: {str(error).splitlines()[0]}")
            continue
        print(f"  {config}: {us:.1f} us")
        if us < best_us:
            best, best_us = config, us
    launcher.configs[key] = default
    return best


def keys_with_candidates(recording: Recording) -> Iterator[tuple[tuple[str, str], Call]]:
    """What is worth measuring."""
    for key, call in sorted(recording.calls.items(), key=lambda item: item[0]):
        if candidates_of(call.field, key):
            yield key, call


def main() -> int:
    """Tune and write, or say what would be."""
    parser = argparse.ArgumentParser(description="Tune kernels on the GPU that is there.")
    parser.add_argument("--model", nargs="+", choices=shipped(), default=list(shipped()))
    parser.add_argument("--dry-run", action="store_true", help="say what would be measured")
    parser.add_argument("--out", type=Path, default=tuned.FOLDER)
    args = parser.parse_args()
    cache = CacheConfig(dtype=KvDType.BF16, block_tokens=BLOCK_TOKENS)
    configs: dict[str, dict[str, Config]] = {}
    for name in args.model:
        [model] = read_models(name, cache)
        cache_of_model = replace(model.config.cache, memory_bytes=KV_BYTES)
        model = replace(model, config=replace(model.config, cache=cache_of_model))
        if args.dry_run:
            with ahead.listing("sm_90") as launcher:
                recording = calls_of(model, launcher)
        else:
            launcher = Launcher("cuda")
            recording = calls_of(model, launcher)
        for key, call in keys_with_candidates(recording):
            op, bucket = key
            if bucket in configs.get(op, {}):
                continue
            count = len(candidates_of(call.field, key))
            print(f"{name}: {op} {bucket}: {count} candidates", flush=True)
            best = recording.defaults[key]
            if not args.dry_run:
                best = tuned_of(launcher, key, call, best)
            configs.setdefault(op, {})[bucket] = best
    if not args.dry_run:
        device = torch.cuda.get_device_name()
        print("written to", tuned.write(device, triton.__version__, configs, args.out))
    return 0


if __name__ == "__main__":
    sys.exit(main())
