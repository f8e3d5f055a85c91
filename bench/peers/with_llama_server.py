"""llama.cpp's server over HTTP, each prompt a stream of its own.

usage: python -m vivace.bench.peers.with_llama_server PROGRAM MODEL.gguf THREADS [its own flags...]
"""

import asyncio
import json
import socket
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

from vivace.bench.peers.speak import Event, Prompts, now, serve

HOST = "127.0.0.1"
STREAMS, CONTEXT = 16, 1024  # at a time; tokens of each
START_S, STOP_S = 120, 30
LINE_BYTES = 1 << 24
DATA = b"data: "


def main(program: str, model: str, threads: str, flags: list[str]) -> None:
    """Start the server, wait until it is ready, serve until there are no more jobs."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    words = [program, "-m", model, "-t", threads, "-tb", threads, "-np", str(STREAMS)]
    words += ["-c", str(STREAMS * CONTEXT), "--host", HOST, "--port", str(port), "--no-ui", *flags]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(words, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        _wait(server, port)

        def run(prompts: Prompts, tokens: int) -> tuple[float, list[Event]]:
            return asyncio.run(_run(port, prompts, tokens))

        serve(run, version="llama.cpp", process=server.pid)
    finally:
        server.terminate()
        server.wait(STOP_S)


def _wait(server: "subprocess.Popen[bytes]", port: int) -> None:
    end = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < end:
        try:
            with urlopen(f"http://{HOST}:{port}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            pass  # not listening yet, or still loading
        time.sleep(0.005)
    raise RuntimeError(f"no server after {START_S} s, exit status {server.poll()}")


async def _run(port: int, prompts: Prompts, tokens: int) -> tuple[float, list[Event]]:
    start = now()
    found = await asyncio.gather(
        *(_stream(port, i, list(prompt), tokens) for i, prompt in enumerate(prompts))
    )
    return start, [event for events in found for event in events]


async def _stream(port: int, number: int, prompt: list[int], tokens: int) -> list[Event]:
    request = {
        "prompt": prompt,
        "n_predict": tokens,
        "ignore_eos": True,
        "stream": True,
        "cache_prompt": False,
        "temperature": 0,
        "samplers": ["top_k"],
        "top_k": 1,
    }
    body = json.dumps(request).encode()
    head = f"POST /completion HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    reader, writer = await asyncio.open_connection(HOST, port, limit=LINE_BYTES)
    writer.write(head.encode() + body)
    lines: list[tuple[float, bytes]] = []
    while line := await reader.readline():
        if line.startswith(DATA):
            lines.append((now(), line))  # looked into when the time has been taken
    writer.close()
    return read_stream(number, lines)


def read_stream(number: int, lines: list[tuple[float, bytes]]) -> list[Event]:
    """The tokens of each message of a stream. Raises RuntimeError for an error in it.

    Tokens whose text ends within a character are held back, at the end for good: the last message says how many there were.
    """
    events: list[Event] = []
    told = 0
    for when, line in lines:
        message = json.loads(line[len(DATA) :])
        if "error" in message:
            raise RuntimeError(f"the server says {message['error']}")
        count = len(message.get("tokens", ()))
        if message.get("stop"):
            count = message["tokens_predicted"] - told
        events.append((number, when, count))
        told += count
    return events


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
