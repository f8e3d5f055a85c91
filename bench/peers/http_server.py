"""Another engine's server over HTTP: started, waited for, each prompt a stream of server-sent events of its own."""

import asyncio
import json
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from vivace.bench.peers.speak import Event, Prompts, now, serve

HOST = "127.0.0.1"
STREAMS, CONTEXT = 16, 1024  # at a time; tokens of each
STOP_S = 30
LINE_BYTES = 1 << 24
DATA = b"data: "
DONE = b"[DONE]"

Messages = Sequence[tuple[float, dict[str, Any]]]  # when each came, and what


@dataclass(frozen=True, slots=True)
class Api:
    """What a server is asked, and how its answer is read."""

    path: str
    request: Callable[[Sequence[int], int], dict[str, Any]]  # of a prompt and its number of tokens
    read: Callable[[int, Messages], list[Event]]  # of a prompt's number and its stream


def free_port() -> int:
    """One that nobody listens on now."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port: int = free.getsockname()[1]
        return port


def serve_with(words: Sequence[str], port: int, api: Api, *, version: str, start_s: float) -> None:
    """Start a server that will listen on `port`, wait until it is healthy, serve until there are no more jobs."""
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(words, stdin=quiet, stdout=quiet, stderr=quiet)
    try:
        _wait(server, port, start_s)

        def run(prompts: Prompts, tokens: int) -> tuple[float, list[Event]]:
            return asyncio.run(_run(port, api, prompts, tokens))

        serve(run, version=version, process=server.pid)
    finally:
        server.terminate()
        server.wait(STOP_S)


def parsed(lines: Sequence[tuple[float, bytes]]) -> Messages:
    """What a stream's lines say. Raises RuntimeError for an error in it."""
    messages = []
    for when, line in lines:
        content = line.removeprefix(DATA).strip()
        if content == DONE:
            continue
        message = json.loads(content)
        if "error" in message:
            raise RuntimeError(f"the server says {message['error']}")
        messages.append((when, message))
    return messages


def _wait(server: "subprocess.Popen[bytes]", port: int, start_s: float) -> None:
    end = time.monotonic() + start_s
    while server.poll() is None and time.monotonic() < end:
        try:
            with urlopen(f"http://{HOST}:{port}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            pass  # not listening yet, or still loading
        time.sleep(0.005)
    raise RuntimeError(f"no server after {start_s:.0f} s, exit status {server.poll()}")


async def _run(port: int, api: Api, prompts: Prompts, tokens: int) -> tuple[float, list[Event]]:
    start = now()
    found = await asyncio.gather(
        *(_stream(port, api.path, api.request(prompt, tokens)) for prompt in prompts)
    )
    events = [api.read(i, parsed(lines)) for i, lines in enumerate(found)]
    return start, [event for one in events for event in one]


async def _stream(port: int, path: str, request: dict[str, Any]) -> list[tuple[float, bytes]]:
    """The lines of data, when each came. They are looked into when all time has been taken."""
    body = json.dumps(request).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    reader, writer = await asyncio.open_connection(HOST, port, limit=LINE_BYTES)
    try:
        writer.write(head.encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"the server says {(status + await reader.read()).decode()}")
        lines: list[tuple[float, bytes]] = []
        while line := await reader.readline():
            if line.startswith(DATA):
                lines.append((now(), line))
    finally:
        writer.close()
        await writer.wait_closed()
    return lines
