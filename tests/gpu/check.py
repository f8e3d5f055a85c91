"""What is checked on a machine with a GPU, with the Python that is there: parity first, then times.

    PYTHONPATH=src python3 tests/gpu/check.py --results DIR

Needs torch, transformers, tokenizers and safetensors, and the built C++ library; nothing else of
ours is imported but `vivace.kernels` and the models and runner of `vivace.engine`. Writes
DIR/gpu-check.json and ends with status 1 if anything failed. The times are of the reference
backend, which is a specification: they are a baseline, not a speed of Vivace.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # for tests.*, which is not installed

from tests.architectures import MODELS, ONE_OF_EACH  # noqa: E402
from tests.gpu.op_cases import OpCase, compare, fused_cases, op_cases  # noqa: E402
from tests.step_driver import Driver, Oracle, agrees, make_driver, worst_row  # noqa: E402
from tests.tiny_models import make_checkpoint  # noqa: E402
from vivace.kernels.backend import Backend, Ops, load  # noqa: E402

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
CLOSE = 1e-3  # of logprob: a smaller lead may fall either way
WARM_UP, REPEATS = 5, 30


@dataclass(frozen=True)
class Result:
    """One line of the table. `max_error` is relative where there is one; times are tokens per
    second."""

    name: str
    passed: bool
    max_error: float | None = None
    tokens_per_s: float | None = None  # median
    p5: float | None = None
    p95: float | None = None
    note: str = ""


def check_op(case: OpCase, device: Ops, cpu: Ops) -> Result:
    """Ops on the device against those of the CPU on the same inputs."""
    error = compare(case, device, cpu)
    return Result(f"op/{case.name}", error <= case.tolerance, error)


def check_prompts(name: str, directory: Path, device: Ops) -> Iterator[Result]:
    """A tiny random model on the device against transformers on the CPU."""
    oracle, driver = Oracle(directory), make_driver(directory, device)
    rng = np.random.default_rng(7)
    prompt = rng.integers(0, 256, 300).tolist()
    want = oracle.logits(prompt)
    for chunk in (7, 64, 300):
        error = worst_row(driver.prompt_logits(prompt, chunk), want)
        yield Result(f"{name}/prompt in chunks of {chunk}", error <= PROMPT_TOLERANCE, error)
    prompts = [rng.integers(0, 256, 20).tolist() for _ in range(8)]
    wanted = oracle.greedy(prompts, 64)
    agreed = sum(map(agrees, driver.greedy(prompts, 64), wanted, [CLOSE] * 8))
    yield Result(f"{name}/greedy, 64 steps", agreed == 8, note=f"{agreed} of 8 prompts agree")


def check_northstar(device: Ops, cpu: Ops) -> Iterator[Result]:
    """The demo's model: device, C++ and transformers say the same."""
    tokenizer = tokenizers.Tokenizer.from_file(str(NORTHSTAR / "tokenizer.json"))
    prompts = [tokenizer.encode(_chat(question)).ids for question in QUESTIONS]
    oracle = Oracle(NORTHSTAR)
    wanted = [oracle.greedy([prompt], 48)[0] for prompt in prompts]
    for name, ops in (("device", device), ("cpu", cpu)):
        got = make_driver(NORTHSTAR, ops).greedy(prompts, 48)
        agreed = sum(map(agrees, got, wanted, [CLOSE] * len(wanted)))
        note = f"{agreed} of {len(wanted)} questions agree with transformers"
        yield Result(f"northstar/greedy on {name}, 48 steps", agreed == len(wanted), note=note)


def time_northstar(device: Ops) -> Iterator[Result]:
    """Tokens per second of single steps, the logits read back each time."""
    driver = make_driver(NORTHSTAR, device)
    rng = np.random.default_rng(1)
    for batch in (1, 8):
        requests = [driver.add(rng.integers(0, 4000, 256).tolist(), 256) for _ in range(batch)]
        driver.step([(request, 255) for request in requests], rows="last")
        yield _timed(f"northstar/decode, {batch} requests of 256 tokens", driver, requests, 255)
        for request in requests:
            driver.remove(request)
    request = driver.add(rng.integers(0, 4000, 512).tolist(), 512)
    yield _timed("northstar/prefill of 512 tokens", driver, [request], 0)


def _timed(name: str, driver: Driver, requests: Sequence[Any], first: int) -> Result:
    """The same step again and again, from position `first` to the end of each request."""
    rates = []
    for _ in range(WARM_UP + REPEATS):
        for request in requests:
            request.num_computed = first
        chunks = [(request, len(request.tokens) - first) for request in requests]
        start = time.perf_counter()
        driver.step(chunks, rows="last")
        rates.append(sum(count for _, count in chunks) / (time.perf_counter() - start))
    p5, median, p95 = np.percentile(rates[WARM_UP:], (5, 50, 95)).tolist()
    note = "reference, not optimised"
    return Result(name, True, tokens_per_s=median, p5=p5, p95=p95, note=note)


def _chat(question: str) -> str:
    turns = (("system", SYSTEM), ("user", question))
    said = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    return f"{said}<|im_start|>assistant\n"


def run_all(device_name: str) -> Iterator[Result]:
    """Every check, in the order of what depends on what."""
    device = load(Backend.REFERENCE, device=device_name)
    cpu = load(Backend.CPU, threads=4)
    for case in op_cases():
        yield check_op(case, device, cpu)
    reference = load(Backend.REFERENCE, device="cpu")
    for case in fused_cases():
        yield check_op(case, device, reference)
    with tempfile.TemporaryDirectory() as folder:
        for name in TINY:
            kind, overrides = MODELS[name]
            directory = make_checkpoint(Path(folder) / name, kind, **overrides)
            yield from check_prompts(name, directory, device)
    yield from check_northstar(device, cpu)
    yield from time_northstar(device)


def describe(device_name: str) -> dict[str, Any]:
    """The machine that the results are of."""
    is_gpu = device_name.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device_name) if is_gpu else device_name,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        if is_gpu
        else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": sys.version.split()[0],
        "commit": _output("git", "-C", str(ROOT), "rev-parse", "HEAD"),
        "changed_files": _output("git", "-C", str(ROOT), "status", "--porcelain"),
    }


def _output(*command: str) -> str | None:
    """What a command prints; None where it does not exist or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _line(result: Result) -> str:
    error = "" if result.max_error is None else f"error {result.max_error:.1e}"
    rate = "" if result.tokens_per_s is None else f"{result.tokens_per_s:,.0f} tokens/s "
    spread = "" if result.p5 is None else f"({result.p5:,.0f}-{result.p95:,.0f})"
    mark = "ok  " if result.passed else "FAIL"
    return f"{mark}  {result.name:<52} {error}{rate}{spread}  {result.note}".rstrip()


def main(write: Callable[[str], Any] = print) -> int:
    """Run, print and record everything; 1 if a check failed."""
    parser = argparse.ArgumentParser(description="Checks on a machine with a GPU.")
    parser.add_argument("--results", type=Path, required=True, help="folder for gpu-check.json")
    parser.add_argument("--device", default="cuda", help="torch device of the reference backend")
    arguments = parser.parse_args()
    results: list[Result] = []
    path = arguments.results / "gpu-check.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    is_complete = False
    try:
        for result in run_all(arguments.device):
            results.append(result)
            write(_line(result))
        is_complete = True
    finally:  # a check that crashes must not take with it what was found before
        record = describe(arguments.device) | {
            "is_complete": is_complete,
            "results": [asdict(result) for result in results],
        }
        path.write_text(json.dumps(record, indent=2) + "\n")
    failed = [result.name for result in results if not result.passed]
    write(f"{len(results) - len(failed)} of {len(results)} checks passed; see {path}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
