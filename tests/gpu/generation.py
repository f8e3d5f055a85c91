"""Whole models on a device: tiny random ones against transformers and the reference, and Northstar."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

from tests.architectures import MODELS, ONE_OF_EACH
from tests.gpu.machine import ROOT
from tests.gpu.results import Result
from tests.gpu.setting import Part, Setting
from tests.step_driver import Driver, Greedy, Oracle, agrees, make_driver, worst_row
from tests.tiny_models import make_checkpoint
from vivace.engine.models import weights
from vivace.engine.models.decoder import emit
from vivace.engine.models.fuse import fuse
from vivace.engine.models.hf_config import read_spec
from vivace.engine.models.program import Program
from vivace.kernels.backend import Backend, Ops, load
from vivace.kernels.buffer import DType

NORTHSTAR = ROOT / "examples" / "northstar"
QUESTIONS = (
    "How long does delivery take?",
    "I want a refund for order 112-3456789-0000001.",
    "Can I exchange my shoes for a larger size?",
    "Please cancel order 111-2223334-5556667.",
    "我的订单什么时候发货",
)
SYSTEM = "You are a polite support agent of the online shop Northstar Market. Keep answers short."
TINY = (*ONE_OF_EACH, "llama-wide-heads", "phi3-longrope")
PROMPT_TOLERANCE = 1e-4  # of the largest logit of a row
BF16_TOLERANCE = {DType.FP32: 2e-3, DType.BF16: 3e-2}  # likewise of USUAL rows, by the cache's type
USUAL = 0.75  # of the rows: where two experts are nearly tied, a rounding picks another one
Rewrite = Callable[[Program], Program]
CLOSE = 1e-3  # of logprob: a smaller lead may fall either way
WARM_UP, REPEATS = 5, 30


@dataclass(frozen=True)
class Sizes:
    """How much is generated."""

    prompt: int
    chunks: tuple[int, ...]
    prompts: int
    steps: int


FULL, BRIEF = Sizes(300, (7, 64, 300), 8, 64), Sizes(12, (5, 12), 2, 3)


def sizes(setting: Setting) -> Sizes:
    """Few of everything where kernels are interpreted."""
    return BRIEF if setting.is_tiny else FULL


def checkpoint(name: str, folder: str, dtype: torch.dtype = torch.float32) -> Path:
    """A tiny random model."""
    kind, overrides = MODELS[name]
    return make_checkpoint(Path(folder) / name, kind, dtype=dtype, **overrides)


def against_transformers(setting: Setting, name: str, *, is_checked: bool) -> Iterator[Result]:
    """fp32, of the backend that is checked or of the reference on the device."""
    ops = setting.ops() if is_checked else setting.reference()
    title = f"models/{name}, fp32" if is_checked else f"parity/{name}"
    size, rng = sizes(setting), np.random.default_rng(7)
    with tempfile.TemporaryDirectory() as folder:
        directory = checkpoint(name, folder)
        oracle = Oracle(directory)
        driver = make_driver(
            directory, ops, rewrite=fuse if is_checked else lambda program: program
        )
    prompt = rng.integers(0, 256, size.prompt).tolist()
    want = oracle.logits(prompt)
    for chunk in size.chunks:
        error = worst_row(driver.prompt_logits(prompt, chunk), want)
        yield Result(f"{title}: prompt in chunks of {chunk}", error <= PROMPT_TOLERANCE, error)
    prompts = [rng.integers(0, 256, 20).tolist() for _ in range(size.prompts)]
    wanted = oracle.greedy(prompts, size.steps)
    yield _agreement(f"{title}: greedy", driver, prompts, wanted, [CLOSE] * len(prompts))
    if is_checked:
        yield from _compiles_nothing_more(title, driver, rng, size)


def _agreement(
    name: str,
    driver: Driver,
    prompts: Sequence[Sequence[int]],
    wanted: Sequence[Greedy],
    close: Sequence[float],
) -> Result:
    steps = len(wanted[0].tokens)
    agreed = sum(map(agrees, driver.greedy(prompts, steps), wanted, close))
    sure = sum(map(Greedy.first_close, wanted, close))
    note = f"{agreed} of {len(prompts)} agree in {sure} of {len(prompts) * steps} tokens that count"
    return Result(f"{name}, {steps} steps", agreed == len(prompts) and sure > 0, note=note)


def _compiles_nothing_more(
    title: str, driver: Driver, rng: np.random.Generator, size: Sizes
) -> Iterator[Result]:
    """Other lengths, nothing new for the compiler."""
    compilation = driver.runner.ops.compilation
    if compilation is None:  # of a rehearsal without kernels
        return
    compilation.seal(strict=False)
    driver.greedy([rng.integers(0, 256, 19 - i).tolist() for i in range(size.prompts)], 5)
    count = compilation.num_compiled_after_ready
    note = f"{count} compiled or grown"
    yield Result(f"{title}: other lengths compile nothing", count == 0, note=note)


def rounding(ops: Ops) -> Ops:
    """The reference, but rows are rounded to the type of the matrix or cache that they meet, as tensor cores want it."""

    def rounded(run: Callable[..., None], place: int) -> Callable[..., None]:
        def run_rounded(out: Any, x: torch.Tensor, *rest: Any, **attrs: Any) -> None:
            run(out, x.to(rest[place].dtype).float(), *rest, **attrs)

        return run_rounded

    return replace(
        ops,
        linear=rounded(ops.linear, 0),
        expert_linear=rounded(ops.expert_linear, 1),
        expert_gated=rounded(ops.expert_gated, 3),
        expert_down=rounded(ops.expert_down, 3),
        attention=rounded(ops.attention, 0),
    )


def in_bf16(setting: Setting, name: str, cache: DType) -> Iterator[Result]:
    """bf16 matrices, against the reference's fp32 arithmetic on the same rounded numbers."""
    size, rng = sizes(setting), np.random.default_rng(8)
    with tempfile.TemporaryDirectory() as folder:
        directory = checkpoint(name, folder, torch.bfloat16)
        specified = rounding(setting.reference())
        checked = specified if setting.backend == "reference" else setting.ops()
        driver, reference = (
            make_driver(directory, ops, rewrite=_bf16_program(directory, cache, then))
            for ops, then in ((checked, fuse), (specified, _as_it_is))
        )
    tolerance = BF16_TOLERANCE[cache]
    prompts = [rng.integers(0, 256, 20).tolist() for _ in range(size.prompts)]
    wanted, errors, close = [], [], []
    for prompt, reply in zip(prompts, reference.greedy(prompts, size.steps), strict=True):
        known = (prompt + reply)[:-1]
        want = reference.prompt_logits(known, len(known))
        got = driver.prompt_logits(known, 16)
        largest = np.abs(want).max(axis=1)
        errors += (np.abs(got - want).max(axis=1) / largest).tolist()
        best = np.sort(want[len(prompt) - 1 :], axis=1)
        wanted.append(Greedy(reply, (best[:, -1] - best[:, -2]).tolist()))
        close.append(2 * tolerance * float(largest.max()))  # two logits may each be off so much
    title, error = f"models/{name}, bf16, {cache.value} cache", float(np.quantile(errors, USUAL))
    note = f"{sum(e > tolerance for e in errors)} of {len(errors)} rows are off by more"
    yield Result(f"{title}: logits", error <= tolerance, error, note=note)
    found = _agreement(f"{title}: greedy", driver, prompts, wanted, close)
    has_experts = any("expert" in call.op for call in driver.program.calls)
    is_excused = has_experts and cache is DType.BF16  # a near-tie of experts falls the other way
    yield replace(found, passed=found.passed or (None if is_excused else False))


def _as_it_is(program: Program) -> Program:
    return program


def _bf16_program(directory: Path, cache: DType, then: Rewrite) -> Rewrite:
    spec = read_spec(directory)
    kept = weights.as_stored(directory, emit(spec, cache), spec.architecture)
    return lambda _: then(kept)


def northstar_agrees(setting: Setting) -> Iterator[Result]:
    """The demo's model: the checked backend, reference, C++ and transformers say the same."""
    tokenizer = tokenizers.Tokenizer.from_file(str(NORTHSTAR / "tokenizer.json"))
    steps, few = (3, 1) if setting.is_tiny else (48, len(QUESTIONS))
    prompts = [tokenizer.encode(_chat(question)).ids for question in QUESTIONS[:few]]
    oracle = Oracle(NORTHSTAR)
    wanted = [oracle.greedy([prompt], steps)[0] for prompt in prompts]
    backends = {setting.backend: setting.ops(), "reference": setting.reference()}
    for name, ops in (backends | {"cpu": load(Backend.CPU, threads=4)}).items():
        driver = make_driver(NORTHSTAR, ops, num_blocks=64)
        yield _agreement(f"northstar/{name}: greedy", driver, prompts, wanted, [CLOSE] * few)


def northstar_times(setting: Setting, backend: str) -> Iterator[Result]:
    """Tokens per second of single steps, the logits read back each time; a baseline, no bar."""
    ops = load(Backend(backend), device=setting.device)
    driver = make_driver(NORTHSTAR, ops)
    rng = np.random.default_rng(1)
    context = 20 if setting.is_tiny else 256
    for batch in (1, 2 if setting.is_tiny else 8):
        requests = [
            driver.add(rng.integers(0, 4000, context).tolist(), context) for _ in range(batch)
        ]
        driver.step([(request, context - 1) for request in requests], rows="last")
        name = f"northstar/{backend}: decode, {batch} requests of {context} tokens"
        yield _timed(setting, name, driver, requests, context - 1)
        for request in requests:
            driver.remove(request)
    request = driver.add(rng.integers(0, 4000, 2 * context).tolist(), 2 * context)
    name = f"northstar/{backend}: prefill of {2 * context} tokens"
    yield _timed(setting, name, driver, [request], 0)


def _timed(
    setting: Setting, name: str, driver: Driver, requests: Sequence[Any], first: int
) -> Result:
    """The same step again and again, from position `first` to the end of each request."""
    rates = []
    for _ in range(2 if setting.is_tiny else WARM_UP + REPEATS):
        for request in requests:
            request.num_computed = first
        chunks = [(request, len(request.tokens) - first) for request in requests]
        start = time.perf_counter()
        driver.step(chunks, rows="last")
        rates.append(sum(count for _, count in chunks) / (time.perf_counter() - start))
    kept = rates[0 if setting.is_tiny else WARM_UP :]
    p5, median, p95 = np.percentile(kept, (5, 50, 95)).tolist()
    note = f"{p5:,.0f}-{p95:,.0f}; uncaptured, a step at a time: the host is in it"
    return Result(name, None, tokens_per_s=median, note=note)


def _chat(question: str) -> str:
    turns = (("system", SYSTEM), ("user", question))
    said = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    return f"{said}<|im_start|>assistant\n"


IN_BF16 = ("llama", "qwen3", "gemma2", "qwen3_moe", "mixtral", "gpt_oss")


def parts() -> Mapping[str, Part]:
    """Tiny models on the checked backend: first those that differ most."""
    kinds = {MODELS[name][0]: name for name in reversed(TINY)}
    first = [kinds[kind] for kind in IN_BF16]
    found: dict[str, Part] = {
        f"{name}, bf16, {cache.value} cache": partial(in_bf16, name=name, cache=cache)
        for cache in BF16_TOLERANCE
        for name in first
    }
    for name in dict.fromkeys((*first, *TINY)):
        found[f"{name}, fp32"] = partial(against_transformers, name=name, is_checked=True)
    return found


def parity_parts() -> Mapping[str, Part]:
    """The same on the reference."""
    return {name: partial(against_transformers, name=name, is_checked=False) for name in TINY}


def northstar_parts() -> Mapping[str, Part]:
    """The demo's model."""
    backends = ("triton", "reference")
    times: dict[str, Part] = {f"times, {b}": partial(northstar_times, backend=b) for b in backends}
    return {"agrees": northstar_agrees, **times}
