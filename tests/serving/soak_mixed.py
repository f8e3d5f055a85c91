"""The mixed stage of the soak: all kinds of requests beside a process that keeps a CPU busy, then none at all."""

import asyncio
import os
import random
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles

from tests.serving.server_process import CHAT, PROMPT, engine_pids
from vivace.serving.client import AsyncClient

ARGUMENTS = ("--quantize", "int8", "--kv-cache-dtype", "int8")
LOAD_S, IDLE_S = 600.0, 60.0
STALL_S = 0.2
IDLE_SHARE = 0.01  # of a core
NUM_USERS = 8
WITNESS = """
import time
while True:
    start = time.monotonic()
    time.sleep(0.005)
    if (end := time.monotonic()) - start > 0.02:
        print(start, end, flush=True)
"""


class User:
    """One who asks for something, then for something else. `waits`: from message to message of each stream."""

    def __init__(self, client, seed, waits):
        self._client = client
        self._draw = random.Random(seed)
        self._waits = waits
        self.num_requests = 0

    async def ask_until(self, end):
        kinds = (self._stream, self._stream, self._chat, self._hang_up, self._unary, self._batch)
        while time.monotonic() < end:
            await self._draw.choice((*kinds, self._embed))()
            self.num_requests += 1
            await asyncio.sleep(self._draw.expovariate(20))

    def _prompt(self):
        draw = self._draw
        own = [draw.randrange(100, 4000) for _ in range(draw.choice((3, 40, 300)))]
        return [*range(200, 264), *own] if draw.random() < 0.5 else own

    def _options(self):
        draw = self._draw
        return {
            "max_tokens": draw.choice((4, 32, 128)),
            "temperature": draw.choice((0, 0.8)),
            "repetition_penalty": draw.choice((1.0, 1.2)),
            "logprobs": draw.choice((None, 3)),
        }

    async def _read(self, events, most=10**9):
        last, count = None, 0
        async for _ in events:
            now = time.monotonic()
            if last is not None:
                self._waits.append((last, now))
            last, count = now, count + 1
            if count == most:
                break

    async def _stream(self):
        await self._read(self._client.generate(self._prompt(), **self._options()))

    async def _chat(self):
        await self._read(self._client.chat(CHAT, **self._options()))

    async def _hang_up(self):
        async with self._client.generate(self._prompt(), max_tokens=400, ignore_eos=True) as events:
            await self._read(events, most=self._draw.randrange(1, 50))

    async def _unary(self):
        await self._client.complete(self._prompt(), n=2, **self._options())

    async def _batch(self):
        await self._client.batch([self._prompt() for _ in range(6)], max_tokens=8)

    async def _embed(self):
        await self._client.embed([PROMPT, self._prompt()])


async def load(target, seconds):
    """Requests made, and the waits of all streams."""
    waits = []
    async with AsyncClient(target) as client:
        users = [User(client, seed, waits) for seed in range(NUM_USERS)]
        end = time.monotonic() + seconds
        await asyncio.gather(*(user.ask_until(end) for user in users))
    return sum(user.num_requests for user in users), waits


@contextmanager
def beside(code):
    """A process of a few lines; what it prints is yielded afterwards, in a list that is empty before."""
    said = []
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        yield said
    finally:
        process.kill()
        said += process.communicate()[0].splitlines()


def mixed(server, check, seconds=LOAD_S, idle_s=IDLE_S):
    """No wait of a stream may be longer than a stall but for the time in which a process that only sleeps was not woken
    either."""
    with beside("while True: pass"), beside(WITNESS) as said:
        num_requests, waits = asyncio.run(load(server.target, seconds))
    pauses = [tuple(map(float, line.split())) for line in said if len(line.split()) == 2]
    lengths = [end - start for start, end in waits]
    print(
        f"  {num_requests} requests, {len(waits)} waits between messages, ms: "
        f"median {quantiles(lengths)[1] * 1e3:.1f}, p99 {quantiles(lengths, n=100)[98] * 1e3:.1f}, "
        f"worst {max(lengths) * 1e3:.1f}; the sleeper's worst {max((b - a for a, b in pauses), default=0) * 1e3:.1f}"
    )
    stalls = [wait for wait in waits if wait[1] - wait[0] - _explained(wait, pauses) > STALL_S]
    pids = (server.process.pid, *engine_pids(server.process.pid))
    time.sleep(1)
    before = sum(map(cpu_s, pids))
    time.sleep(idle_s)
    share = (sum(map(cpu_s, pids)) - before) / idle_s
    print(f"  {share:.2%} of a core without requests, over {idle_s:.0f} s")
    check(
        not stalls,
        f"{len(stalls)} stalls, the longest {max(b - a for a, b in stalls or [(0, 0)]):.2f} s",
    )
    check(share <= IDLE_SHARE, "it is not idle without requests")


def _explained(wait, pauses):
    return sum(max(0.0, min(wait[1], end) - max(wait[0], start)) for start, end in pauses)


def cpu_s(pid):
    """CPU time of a process so far, its threads included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
