"""Long runs against the real server: `python tests/serving/soak.py [cancel burst silence mixed]`.

cancel: 1,000 requests that hang up at every stage. burst: for 30 s ten times as many requests as the server can serve.
silence: a call that says nothing for five minutes while its client pings. mixed: ten minutes of all kinds of requests beside
a busy process, then a minute of none. During cancel and burst another process asks for health every 20 ms. Exits with 1 if a
block leaks, a request does not end in exactly one way, a refusal names no time to wait, health takes over 100 ms, a stream
stalls, or a server without requests computes.
"""

import argparse
import asyncio
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import quantiles
from threading import Event

import grpc
from h2.events import DataReceived

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.serving import soak_mixed
from tests.serving.http2 import Connection
from tests.serving.server_process import PROMPT, serving, wait_until
from vivace.serving.client import Client
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb
from vivace.serving.protos.vivace.v1 import inference_pb2_grpc as pb_grpc

HEALTH_MS = 100.0
BURST_S = 30.0
SILENCE_S = 300.0
PROBE = """
import sys, time
from vivace.serving.client import Client
with Client(sys.argv[1]) as client:
    while True:
        start = time.perf_counter()
        status = client.health(timeout=5)
        print(status, (time.perf_counter() - start) * 1e3, flush=True)
        time.sleep(0.02)
"""


class Failed(Exception):
    """What does not hold."""


def check(holds, what):
    if not holds:
        raise Failed(what)


@contextmanager
def health_watched(target):
    """Another process asks for health; afterwards its answers are judged."""
    probe = subprocess.Popen(
        [sys.executable, "-c", PROBE, target], stdout=subprocess.PIPE, text=True
    )
    assert probe.stdout.readline().startswith("SERVING")
    try:
        yield
    finally:
        probe.terminate()
        # The last line may be cut short: the probe was ended while it wrote.
        answers = [line.split() for line in probe.communicate()[0].splitlines()[:-1]]
    times = [float(ms) for _, ms in answers]
    cuts = quantiles(times, n=100)
    print(
        f"  health: {len(times)} answers, ms: median {cuts[49]:.1f}, p99 {cuts[98]:.1f}, worst {max(times):.1f}"
    )
    check(all(status == "SERVING" for status, _ in answers), "health was not SERVING")
    check(max(times) <= HEALTH_MS, f"health took {max(times):.1f} ms")


def check_free(client):
    wait_until(lambda: not (client.loads().num_running or client.loads().num_waiting), 30)
    loads = client.loads()
    print(
        f"  blocks held afterwards: {loads.num_blocks_used}; longest cancel to free: {loads.cancel_to_free_s * 1e3:.1f} ms"
    )
    check(loads.num_blocks_used == 0, "blocks leaked")


async def one(stub, ends, *, max_tokens, hang_up_s=None, number=0):
    """One request, and how it ended."""
    ids = pb.TokenIds(ids=[5 + number % 4000, *range(100, 180)])
    sampling = pb.SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    call = stub.Generate(pb.GenerateRequest(token_ids=ids, sampling=sampling))
    if hang_up_s is not None:
        asyncio.get_running_loop().call_later(hang_up_s, call.cancel)
    finishes = 0
    try:
        async for response in call:
            finishes += response.HasField("finish")
    except grpc.aio.AioRpcError as error:
        waits = dict(error.trailing_metadata() or ())
        ends.append((error.code().name, waits.get("grpc-retry-pushback-ms")))
    except asyncio.CancelledError:  # how a call that its client cancels ends for it
        ends.append(("CANCELLED", None))
    else:
        ends.append(("OK" if finishes == 1 else f"{finishes} finishes", None))


def counted(ends):
    counts = {}
    for code, _ in ends:
        counts[code] = counts.get(code, 0) + 1
    print("  ends: " + ", ".join(f"{code} {count}" for code, count in sorted(counts.items())))
    return counts


def cancel(server, client):
    """A storm of hang-ups."""

    async def storm():
        ends = []
        async with grpc.aio.insecure_channel(server.target) as channel:
            stub = pb_grpc.InferenceStub(channel)
            await asyncio.gather(
                *(
                    one(stub, ends, max_tokens=1500, hang_up_s=0.003 * i, number=i)
                    for i in range(1000)
                )
            )
        return ends

    with health_watched(server.target):
        counts = counted(asyncio.run(storm()))
    check(
        sum(counts.values()) == 1000 and set(counts) <= {"CANCELLED", "RESOURCE_EXHAUSTED"},
        "odd ends",
    )
    check(client.loads().num_requests_aborted > 0, "none was accepted")
    check_free(client)


def burst(server, client):
    """First what can be served, then ten times that."""

    async def load(rate, seconds):
        ends, tasks = [], set()
        async with grpc.aio.insecure_channel(server.target) as channel:
            stub = pb_grpc.InferenceStub(channel)
            start, number = time.monotonic(), 0
            while (now := time.monotonic() - start) < seconds:
                while number < rate * now:
                    tasks.add(asyncio.create_task(one(stub, ends, max_tokens=16, number=number)))
                    number += 1
                await asyncio.sleep(0.005)
            took = await asyncio.gather(*tasks)
        assert len(took) == number
        return ends, time.monotonic() - start

    async def served_per_s():
        ends = []
        async with grpc.aio.insecure_channel(server.target) as channel:
            stub = pb_grpc.InferenceStub(channel)

            async def again():
                while time.monotonic() < end:
                    await one(stub, ends, max_tokens=16, number=len(ends))

            end = time.monotonic() + 5
            await asyncio.gather(*(again() for _ in range(32)))
        return len(ends) / 5

    rate = 10 * asyncio.run(served_per_s())
    print(f"  offered: {rate:.0f} requests/s for {BURST_S:.0f} s")
    with health_watched(server.target):
        ends, seconds = asyncio.run(load(rate, BURST_S))
        counts = counted(ends)
        print(f"  all had ended after {seconds:.1f} s")
    check(set(counts) == {"OK", "RESOURCE_EXHAUSTED"}, "none was accepted, or none refused")
    waits = [int(wait or -1) for code, wait in ends if code != "OK"]
    check(min(waits) > 0, "a refusal without a time to wait")
    check_free(client)


@contextmanager
def held_up(client):
    """A server of one request at a time that has others to serve before any of priority 0."""
    over = Event()

    def serve_others():
        while not over.is_set():
            list(client.generate("x", max_tokens=1000, ignore_eos=True, priority=1))

    with ThreadPoolExecutor(3) as pool:
        others = [pool.submit(serve_others) for _ in range(3)]
        try:
            wait_until(lambda: client.loads().num_waiting == 2)
            yield
        finally:
            over.set()
    for other in others:
        other.result()


def silence(server, client):
    """A ping every ten seconds, as keepalive has it, during a unary call that waits in the queue for minutes."""
    with Connection(server.target) as connection:
        connection.settimeout(0.5)
        with held_up(client):
            stream, pings = ping(connection)
        connection.settimeout(60)
        check(connection.status(stream, 60) == (0, ""), "the silent call did not end well")
    print(f"  {pings} pings, no GOAWAY")


def ping(connection):
    """For as long as a silent call waits; the call, and how many."""
    request = pb.GenerateRequest(text=PROMPT, sampling=pb.SamplingParams(max_tokens=2))
    stream = connection.call("GenerateUnary", request.SerializeToString())
    end, pings = time.monotonic() + SILENCE_S, 0
    while time.monotonic() < end:
        connection.ping()
        pings += 1
        wake = min(end, time.monotonic() + 10)
        while time.monotonic() < wake:
            try:
                check(connection.receive() is not None, "the connection was closed")
            except TimeoutError:
                continue
    check(not connection.goaways(), "a GOAWAY")
    check(not any(isinstance(one, DataReceived) for one in connection.events), "it was not silent")
    return stream, pings


def mixed(server, client):
    soak_mixed.mixed(server, check)
    check_free(client)


ARGUMENTS = {"silence": ("--max-running", "1"), "mixed": soak_mixed.ARGUMENTS}
STAGES = {"cancel": cancel, "burst": burst, "silence": silence, "mixed": mixed}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stages", nargs="*", choices=(*STAGES, "all"), default="all")
    failed = False
    stages = parser.parse_args().stages
    for name in STAGES if "all" in stages else stages:
        print(f"{name}:", flush=True)
        with serving(*ARGUMENTS.get(name, ())) as server, Client(server.target) as client:
            list(client.generate(PROMPT, max_tokens=2))
            try:
                STAGES[name](server, client)
            except Failed as error:
                print(f"  FAILED: {error}")
                failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
