"""Vivace over gRPC, each prompt a stream of its own.

usage: python -m vivace.bench.peers.with_vivace_server MODEL QUANTIZE CACHE_DIR THREADS
"""

import asyncio
import subprocess
import sys

import uvloop

from vivace.bench.peers.speak import Event, Prompts, now, serve
from vivace.serving.client.aio import AsyncClient

STOP_S = 30


def main(model: str, quantize: str, cache_dir: str, threads: str) -> None:
    """Start the server, wait until it is ready, serve until there are no more jobs."""
    settings = {
        "weights.quantize": quantize,
        "weights.cache_dir": cache_dir,
        "cpu.threads": threads,
    }
    words = [sys.executable, "-P", "-m", "vivace", "serve", model, "--port", "0"]
    for name, value in settings.items():
        words += ["--set", f"{name}={value}"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            target = server.stdout.readline().split()[-1]  # printed once the model is loaded
            with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:

                def run(prompts: Prompts, tokens: int) -> tuple[float, list[Event]]:
                    return runner.run(_run(target, prompts, tokens))

                serve(run, version="vivace over gRPC", process=server.pid)
        finally:
            server.terminate()
            server.wait(STOP_S)


async def _run(target: str, prompts: Prompts, tokens: int) -> tuple[float, list[Event]]:
    async with AsyncClient(target) as client:
        start = now()
        found = await asyncio.gather(
            *(_stream(client, i, list(ids), tokens) for i, ids in enumerate(prompts))
        )
    return start, [event for events in found for event in events]


async def _stream(client: AsyncClient, number: int, ids: list[int], tokens: int) -> list[Event]:
    events = []
    async with client.generate(ids, max_tokens=tokens, temperature=0, ignore_eos=True) as stream:
        async for event in stream:
            events.append((number, now(), len(event.token_ids)))
    return events


if __name__ == "__main__":
    main(*sys.argv[1:5])
