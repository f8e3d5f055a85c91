"""vLLM's server on a CPU, over HTTP, each prompt a stream of its own. It caches prefixes, as it does unless told otherwise.

usage: python -m vivace.bench.peers.with_vllm PYTHON MODEL DTYPE THREADS      takes a minute or two to start
"""

import os
import sys
from collections.abc import Sequence
from typing import Any

from vivace.bench.peers.http_server import (
    CONTEXT,
    HOST,
    STREAMS,
    Api,
    Messages,
    free_port,
    serve_with,
)
from vivace.bench.peers.speak import Event

START_S = 600  # its first start compiles
CACHE_GB = 2
NAME = "model"


def main(python: str, model: str, dtype: str, threads: int) -> None:
    """Start the server, wait until it is ready, serve until there are no more jobs."""
    port = free_port()
    cpus = sorted(os.sched_getaffinity(0))[:threads]
    settings = {
        "VLLM_CPU_KVCACHE_SPACE": CACHE_GB,
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cpus)),
        "VLLM_NO_USAGE_STATS": 1,
        "HF_HUB_OFFLINE": 1,
    }
    flags = {
        "model": model,
        "served-model-name": NAME,
        "dtype": dtype,
        "max-model-len": CONTEXT,
        "max-num-seqs": STREAMS,
        "host": HOST,
        "port": port,
    }
    words = ["env", *(f"{name}={value}" for name, value in settings.items())]
    words += [python, "-P", "-m", "vllm.entrypoints.openai.api_server", "--disable-log-stats"]
    words += [f"--{name}={value}" for name, value in flags.items()]
    api = Api("/v1/completions", _request, read_stream)
    serve_with(words, port, api, version="vllm", start_s=START_S)


def _request(prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    return {
        "model": NAME,
        "prompt": list(prompt),
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }


def read_stream(number: int, messages: Messages) -> list[Event]:
    """The tokens that each message of a stream adds to those told of before; the last one often adds none."""
    events: list[Event] = []
    told = 0
    for when, message in messages:
        count = message["usage"]["completion_tokens"] - told
        if count:
            events.append((number, when, count))
        told += count
    return events


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4]))
