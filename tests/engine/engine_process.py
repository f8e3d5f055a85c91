"""Starts fake engines in processes of their own, and asks what became of them."""

import asyncio
import json
import sys
import time
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop

from vivace.engine.config import Config
from vivace.engine.events import EngineRequest, Sampling
from vivace.engine.runtimes.native import NativeEngine, Watch, spawn

FAKE = (sys.executable, "-P", str(Path(__file__).parent / "fake_engine.py"))
WATCH = Watch(ping_s=0.1, silence_s=1.0)
GREEDY = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "seed": 0,
    "min_tokens": 0,
    "stop_token_ids": (),
}


def run(coroutine, seconds=30):
    """Run on the server's kind of loop. Whatever a callback or a forgotten task raised is raised here."""
    problems = []
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.get_loop().set_exception_handler(lambda _, context: problems.append(context))
        result = runner.run(asyncio.wait_for(coroutine, seconds))
    assert problems == []
    return result


def model(directory, name="model.json", **settings):
    """The file that a fake engine takes for its model."""
    path = directory / name
    path.write_text(json.dumps(settings), encoding="utf-8")
    return Config(model=path)


@asynccontextmanager
async def running(config, watch=WATCH, command=FAKE):
    engine = await NativeEngine.start(
        config, lambda done, total: None, child=spawn(command), watch=watch
    )
    try:
        yield engine
    finally:
        await engine.close()


def request(
    id_, *, first=0, max_tokens=5, salt=b"", logprobs=None, prompt=None, prompt_logprobs=None
):
    sampling = Sampling(
        **GREEDY, max_tokens=max_tokens, logprobs=logprobs, prompt_logprobs=prompt_logprobs
    )
    return EngineRequest(id_, prompt or (first,), sampling, salt=salt)


async def collect_request(engine, sent):
    return [event async for event in engine.generate(sent)]


async def collect(engine, *args, **kwargs):
    return await collect_request(engine, request(*args, **kwargs))


def tokens(events):
    return [token for event in events for token in event.token_ids]


async def until(condition, seconds=5.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        await asyncio.sleep(0.01)


async def until_running(engine, count):
    for _ in range(500):
        if (await engine.loads()).num_running == count:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"never {count} running")


def pid_of(engine):
    return engine._process.pid


def is_alive(pid):
    """A zombie does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def is_reaped(pid):
    return not Path(f"/proc/{pid}").exists()


async def streaming(engine, count, salt=b""):
    """So many endless streams that have begun."""
    tasks = [
        asyncio.create_task(collect(engine, f"s{i}", max_tokens=10**6, salt=salt))
        for i in range(count)
    ]
    while (await engine.loads()).num_running < count:
        await asyncio.sleep(0.01)
    return tasks
