"""Which engines are compared, where a prepared folder has them, and how one is talked to.

A prepared folder (`prepare.py`) has a virtual environment for each engine, llama.cpp's sources and programs, and the
exported models: `models/NAME-...`, NAME being the folder of the checkpoint.
"""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from vivace.bench.job import Event, Job, Timing, timing
from vivace.bench.peers.speak import MARK
from vivace.engine.errors import ConfigError

MODULES = "vivace.bench.peers"
STOP_S = 60
SAMPLE_S = 0.2
# Weights read into memory, which malloc then asks huge pages for, instead of mapped from the file.
TUNED = ("env", "GLIBC_TUNABLES=glibc.malloc.hugetlb=1")


@dataclass(frozen=True, slots=True)
class Setting:
    """Where everything is."""

    model: Path  # a checkpoint
    peers: Path  # a prepared folder
    cache_dir: Path  # of Vivace's packed weights
    source: Path  # holds nothing but the package `vivace`, for other environments
    threads: int

    def export(self, what: str) -> Path:
        """An exported model. Raises ConfigError if it is not there."""
        return self._there(self.peers / "models" / f"{self.model.name}-{what}")

    def program(self, path: str) -> Path:
        """A program of the prepared folder. Raises ConfigError if it is not there."""
        return self._there(self.peers / path)

    def _there(self, path: Path) -> Path:
        if not path.exists():
            raise ConfigError(
                f"--peers: {path} is not there; run python -m {MODULES}.prepare {self.peers} {self.model}"
            )
        return path


Command = Callable[[Setting], list[str]]


def vivace(kind: str, quantize: str, *more: str) -> Command:
    """`kind`: with_vivace, or with_vivace_server."""

    def command(at: Setting) -> list[str]:
        words = [str(at.model), quantize, str(at.cache_dir), str(at.threads), *more]
        return [sys.executable, "-P", "-m", f"{MODULES}.{kind}", *words]

    return command


def openvino(kind: str, export: str) -> Command:
    """`kind` as with_openvino.py has it."""

    def command(at: Setting) -> list[str]:
        python = _foreign(at, "ov/bin/python", "with_openvino")
        return [*python, str(at.export(export)), kind, str(at.threads)]

    return command


def onnxruntime(export: str) -> Command:
    """The threads are in its folder."""

    def command(at: Setting) -> list[str]:
        return [*_foreign(at, "ort/bin/python", "with_onnxruntime"), str(at.export(export))]

    return command


def llama_server(export: str, *, is_tuned: bool = False) -> Command:
    """As it comes, or with weights in huge pages."""

    def command(at: Setting) -> list[str]:
        program = at.program("llama.cpp/build/bin/llama-server")
        words = [sys.executable, "-P", "-m", f"{MODULES}.with_llama_server", str(program)]
        words += [str(at.export(export)), str(at.threads)]
        return [*TUNED, *words, "--load-mode", "none"] if is_tuned else words

    return command


def vllm(dtype: str) -> Command:
    """The checkpoint as it is."""

    def command(at: Setting) -> list[str]:
        words = [
            sys.executable,
            "-P",
            "-m",
            f"{MODULES}.with_vllm",
            str(at.program("vllm/bin/python")),
        ]
        return [*words, str(at.model), dtype, str(at.threads)]

    return command


def _foreign(at: Setting, python: str, module: str) -> list[str]:
    source = f"PYTHONPATH={at.source}"
    return ["env", source, str(at.program(python)), "-P", "-m", f"{MODULES}.{module}"]


ENGINES: dict[str, Command] = {
    "vivace int8": vivace("with_vivace", "int8"),
    "vivace int4": vivace("with_vivace", "int4"),
    "vivace int8, AVX2": vivace("with_vivace", "int8", "avx2"),
    "vivace int8, gRPC": vivace("with_vivace_server", "int8"),
    "vivace int4, gRPC": vivace("with_vivace_server", "int4"),
    # Keys and values in 16 bits, as llama.cpp has them.
    "vivace int8, bf16 cache, gRPC": vivace("with_vivace_server", "int8", "bf16"),
    "openvino int8, batching": openvino("batching", "ov-int8"),
    "openvino int8, prefix": openvino("prefix", "ov-int8"),
    "openvino int8, PA": openvino("PA", "ov-int8"),
    "openvino int8, SDPA": openvino("SDPA", "ov-int8"),
    "openvino int4, batching": openvino("batching", "ov-int4"),
    "openvino int4, PA": openvino("PA", "ov-int4"),
    "openvino int4, SDPA": openvino("SDPA", "ov-int4"),
    "onnxruntime int4": onnxruntime("ort-int4"),
    "llama-server Q8_0": llama_server("Q8_0.gguf"),
    "llama-server Q8_0, tuned": llama_server("Q8_0.gguf", is_tuned=True),
    "llama-server Q4_0": llama_server("Q4_0.gguf"),
    "llama-server Q4_0, tuned": llama_server("Q4_0.gguf", is_tuned=True),
    "vllm bf16": vllm("bfloat16"),
}


class Engine:
    """A process that speaks as speak.py says."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        assert process.stdin is not None and process.stdout is not None
        self._orders: IO[str] = process.stdin
        self._answers: IO[str] = process.stdout
        about = self._answer()
        self.version: str = about["version"]
        self._process: int = about["process"]

    def run(self, job: Job) -> Timing:
        """Raises RuntimeError if the process ends or gives another number of tokens."""
        words = {"prompts": job.prompts, "tokens": job.num_tokens}
        print(json.dumps(words), file=self._orders, flush=True)
        answer = self._answer()
        events: list[Event] = [(prompt, when, count) for prompt, when, count in answer["events"]]
        return timing(answer["start"], events, job)

    def peak_bytes(self, job: Job) -> int:
        """The most memory while a job runs: PSS of its process and of all that this has started."""
        found = [_pss_bytes(self._process)]
        is_done = threading.Event()

        def watch() -> None:
            while not is_done.wait(SAMPLE_S):
                found.append(_pss_bytes(self._process))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            self.run(job)
        finally:
            is_done.set()
            watcher.join()
        return max(found)

    def _answer(self) -> dict[str, Any]:
        for line in self._answers:
            if line.startswith(MARK):
                answer: dict[str, Any] = json.loads(line.removeprefix(MARK))
                return answer
        raise RuntimeError("the engine's process ended; what it said is above")


@contextmanager
def started(name: str, at: Setting) -> Iterator[tuple[Engine, float]]:
    """An engine that is loaded, and when its process was launched. It ends with the block."""
    command = ENGINES[name](at)
    launched = time.perf_counter()
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            yield Engine(process), launched
        finally:
            assert process.stdin is not None
            process.stdin.close()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()


def _pss_bytes(process: int) -> int:
    """Of a process and its children; of one that has just ended, nothing."""
    total = 0
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
        for task in Path(f"/proc/{process}/task").iterdir():
            total += sum(map(_pss_bytes, map(int, (task / "children").read_text().split())))
    except (FileNotFoundError, ProcessLookupError):
        pass
    return total
