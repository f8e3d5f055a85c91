"""llama.cpp's server over HTTP, each prompt a stream of its own.

usage: python -m vivace.bench.peers.with_llama_server PROGRAM MODEL.gguf THREADS [its own flags...]
"""

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

START_S = 120


def main(program: str, model: str, threads: str, flags: list[str]) -> None:
    """Start the server, wait until it is ready, serve until there are no more jobs."""
    port = free_port()
    words = [program, "-m", model, "-t", threads, "-tb", threads, "-np", str(STREAMS)]
    words += ["-c", str(STREAMS * CONTEXT), "--host", HOST, "--port", str(port), "--no-ui", *flags]
    api = Api("/completion", _request, read_stream)
    serve_with(words, port, api, version="llama.cpp", start_s=START_S)


def _request(prompt: Sequence[int], tokens: int) -> dict[str, Any]:
    return {
        "prompt": list(prompt),
        "n_predict": tokens,
        "ignore_eos": True,
        "stream": True,
        "cache_prompt": False,
        "temperature": 0,
        "samplers": ["top_k"],
        "top_k": 1,
    }


def read_stream(number: int, messages: Messages) -> list[Event]:
    """The tokens of each message of a stream.

    Tokens whose text ends within a character are held back, at the end for good: the last message says how many there were.
    """
    events: list[Event] = []
    told = 0
    for when, message in messages:
        count = len(message.get("tokens", ()))
        if message.get("stop"):
            count = message["tokens_predicted"] - told
        events.append((number, when, count))
        told += count
    return events


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
