"""From the start of the server process to the first token of a chat, over gRPC, as a user would wait for it."""

import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from vivace.bench.result import Figure, figure
from vivace.serving.client import Client

STOP_S = 30


def measure(model: Path, runs: int, quantize: str = "none") -> list[Figure]:
    """Seconds to ready and to the first token; the first run warms the page cache and is not counted."""
    timed = [_one(model, quantize) for _ in range(runs + 1)][1:]
    ready, first, itl = zip(*timed, strict=True)
    return [
        figure("process start to ready, s", ready),
        figure("process start to first token, s", first),
        figure("median ITL of the reply, ms", itl),
    ]


def _one(model: Path, quantize: str) -> tuple[float, float, float]:
    start = time.monotonic()
    words = ["serve", str(model), "--quantize", quantize, "--port", "0"]
    server = subprocess.Popen(
        [sys.executable, "-m", "vivace", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert server.stdout is not None
        line = (
            server.stdout.readline()
        )  # the only line: it names the port, once the engine is ready
        ready = time.monotonic() - start
        times = []
        with Client(line.rsplit(maxsplit=1)[-1]) as client:
            messages = [{"role": "user", "content": "How many days does delivery take?"}]
            for event in client.chat(messages, temperature=0, max_tokens=32):
                if event.token_ids:
                    times.append(time.monotonic())
    finally:
        server.terminate()
        server.wait(STOP_S)
    gaps = [(b - a) * 1e3 for a, b in pairwise(times)]
    return ready, times[0] - start, median(gaps)
