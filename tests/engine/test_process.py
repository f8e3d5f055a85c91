"""The engine in its own process, seen from the front-end: streams, refusals, and every way to die. A fake computes."""

import asyncio
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections import Counter
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path

import pytest
import uvloop

from tests.engine.fake_engine import logprobs, prompt_logprobs
from vivace.engine import wire
from vivace.engine.config import Config
from vivace.engine.errors import (
    ArtifactError,
    ConfigError,
    EngineDied,
    InvalidRequest,
    Overloaded,
)
from vivace.engine.events import EngineRequest, FinishReason, Sampling
from vivace.engine.runtimes.native import NativeEngine, Watch, spawn

ROOT = Path(__file__).parents[2]
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


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory, monkeypatch):
    """Where sockets are made. Short: the path of a Unix socket has at most 107 bytes."""
    directory = tmp_path_factory.mktemp("t")
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    return directory


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


async def collect(engine, *args, **kwargs):
    return [event async for event in engine.generate(request(*args, **kwargs))]


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


# ---- streams


def test_a_stream_has_every_token_in_order_and_one_last_event(tmp_path):
    async def main():
        async with running(model(tmp_path)) as engine:
            events = await collect(engine, "a", first=7, max_tokens=20)
            assert tokens(events) == list(range(7, 27))
            assert {event.request_id for event in events} == {"a"}
            assert [event.finish for event in events[:-1]] == [None] * (len(events) - 1)
            assert events[-1].finish is FinishReason.LENGTH
            assert events[-1].usage.completion_tokens == 20

    run(main())


def test_many_streams_get_their_own_tokens(tmp_path):
    async def main():
        async with running(model(tmp_path)) as engine:
            calls = [collect(engine, f"r{i}", first=1000 * i, max_tokens=30) for i in range(64)]
            for i, events in enumerate(await asyncio.gather(*calls)):
                assert tokens(events) == list(range(1000 * i, 1000 * i + 30))

    run(main())


def test_a_stream_on_the_loop_of_the_standard_library(tmp_path):
    async def main():
        async with running(model(tmp_path)) as engine:
            assert tokens(await collect(engine, "a", max_tokens=3)) == [0, 1, 2]

    asyncio.run(main())


def test_a_consumer_that_lags_gets_all_it_missed_in_one_event(tmp_path):
    async def main():
        async with running(model(tmp_path, step_s=0.001)) as engine:
            sent = request("slow", prompt=(3, 4), max_tokens=40, logprobs=2, prompt_logprobs=1)
            stream = engine.generate(sent)
            async with aclosing(stream):
                seen = [await anext(stream)]
                await until_running(engine, 0)  # it is done, and nobody has read it
                seen += [event async for event in stream]
            assert len(seen) == 2
            assert tokens(seen) == list(range(3, 43))
            all_logprobs = [entry for event in seen for entry in event.logprobs]
            assert all_logprobs == [logprobs(token, 2) for token in range(3, 43)]
            assert seen[0].prompt_logprobs == prompt_logprobs(sent)
            assert seen[1].prompt_logprobs == ()
            assert seen[1].finish is FinishReason.LENGTH and seen[1].usage is not None

    run(main())


def test_a_slow_consumer_does_not_stop_the_others(tmp_path):
    async def main():
        async with running(model(tmp_path)) as engine:
            stream = engine.generate(request("slow", max_tokens=10**6))
            async with aclosing(stream):
                await anext(stream)
                assert len(tokens(await collect(engine, "fast", max_tokens=50))) == 50

    run(main())


def test_prompt_logprobs_of_many_frames_arrive_whole(tmp_path):
    prompt = tuple(range(30_000))  # 10 MB of logprobs, through frames of at most 2 MB

    async def main():
        async with running(model(tmp_path, max_frame_bytes=2 << 20)) as engine:
            sent = request("a", prompt=prompt, max_tokens=2, prompt_logprobs=20)
            events = [event async for event in engine.generate(sent)]
            assert events[0].prompt_logprobs == prompt_logprobs(sent)
            assert tokens(events) == [0, 1]

    run(main())


# ---- ends before their time


def test_abort_ends_a_stream_with_one_last_event(tmp_path):
    async def main():
        async with running(model(tmp_path)) as engine:
            stream = engine.generate(request("a", max_tokens=10**6))
            await anext(stream)
            assert await engine.abort("a")
            events = [event async for event in stream]
            assert [e.finish for e in events if e.finish] == [FinishReason.ABORT]
            assert not await engine.abort("a")
            assert not await engine.abort("never heard of")

    run(main())


def test_closing_a_stream_frees_its_request_within_one_step(tmp_path):
    log = tmp_path / "log"

    async def main():
        async with running(model(tmp_path, log=str(log), step_s=0.05)) as engine:
            stream = engine.generate(request("a", max_tokens=10**6))
            await anext(stream)
            before = (await engine.loads()).num_steps
            await stream.aclose()
            await until_running(engine, 0)
            [line] = log.read_text().splitlines()
            word, id_, steps = line.split()
            assert (word, id_) == ("abort", "a") and int(steps) <= before + 1

    run(main())


def test_cancelling_a_consumer_frees_its_request(tmp_path):
    async def main():
        async with running(model(tmp_path)) as engine:
            task = asyncio.create_task(collect(engine, "a", max_tokens=10**6))
            await until_running(engine, 1)
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await until_running(engine, 0)

    run(main())


def test_a_stream_that_ended_by_itself_is_not_aborted(tmp_path):
    log = tmp_path / "log"

    async def main():
        async with running(model(tmp_path, log=str(log))) as engine:
            await collect(engine, "a")
            await engine.loads()
        assert not log.exists()

    run(main())


def test_an_id_may_be_used_again_as_soon_as_its_stream_was_closed(tmp_path):
    async def main():
        async with running(model(tmp_path, step_s=0.02)) as engine:
            for i in range(5):
                stream = engine.generate(request("a", first=100 * i, max_tokens=10**6))
                assert tokens([await anext(stream)]) == [100 * i]
                await stream.aclose()
            events = await collect(engine, "a", first=7, max_tokens=3)
            assert tokens(events) == [7, 8, 9]
            assert events[-1].finish is FinishReason.LENGTH

    run(main())


# ---- refusals


def test_an_id_in_use_is_refused_and_its_stream_goes_on(tmp_path):
    async def main():
        async with running(model(tmp_path)) as engine:
            stream = engine.generate(request("a", max_tokens=30))
            seen = [await anext(stream)]
            with pytest.raises(InvalidRequest, match="request_id 'a' is in use"):
                await collect(engine, "a")
            seen += [event async for event in stream]
            assert tokens(seen) == list(range(30))

    run(main())


def test_what_the_engine_refuses_raises_its_error_before_any_event(tmp_path):
    async def main():
        async with running(model(tmp_path, most_requests=1)) as engine:
            stream = engine.generate(request("a", max_tokens=10**6))
            await anext(stream)
            with pytest.raises(Overloaded, match="the queue is full"):
                await collect(engine, "b")
            with pytest.raises(InvalidRequest, match="top_p must be in"):
                await collect(engine, "b", salt=b"invalid")
            await stream.aclose()
            await until_running(engine, 0)
            assert len(tokens(await collect(engine, "b"))) == 5  # the id is free

    run(main())


def test_a_request_that_fits_no_frame_is_refused_and_harms_nothing(tmp_path, monkeypatch):
    async def main():
        async with running(model(tmp_path)) as engine:
            await engine.info()
            monkeypatch.setattr(wire, "MAX_FRAME_BYTES", 2000)
            with pytest.raises(ValueError, match=r"Add of .* bytes, at most 2000"):
                await collect(engine, "a", prompt=(1,) * 3000)
            assert len(tokens(await collect(engine, "a"))) == 5

    run(main())


# ---- death


async def assert_dead(engine, pid, reason):
    """Everything says so, and nothing is left of the process."""
    assert reason in await asyncio.wait_for(engine.died(), 1.0)
    for call in (engine.info(), engine.loads(), collect(engine, "later")):
        with pytest.raises(EngineDied, match=reason):
            await asyncio.wait_for(call, 1.0)
    assert not await engine.abort("a")
    await until(lambda: is_reaped(pid), 1.0)


async def streaming(engine, count, salt=b""):
    """So many endless streams that have begun."""
    tasks = [
        asyncio.create_task(collect(engine, f"s{i}", max_tokens=10**6, salt=salt))
        for i in range(count)
    ]
    while (await engine.loads()).num_running < count:
        await asyncio.sleep(0.01)
    return tasks


async def assert_all_died(tasks, reason):
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        assert isinstance(result, EngineDied) and reason in str(result)


def test_a_killed_engine_ends_every_stream_within_a_second(tmp_path):
    async def main():
        async with running(model(tmp_path)) as engine:
            tasks = await streaming(engine, 20)
            os.kill(pid_of(engine), signal.SIGKILL)
            start = time.monotonic()
            await assert_all_died(tasks, "killed by SIGKILL")
            assert time.monotonic() - start < 1.0
            await assert_dead(engine, pid_of(engine), "killed by SIGKILL")

    run(main())


def test_a_stopped_engine_is_silent(tmp_path):
    async def main():
        async with running(model(tmp_path)) as engine:
            tasks = await streaming(engine, 3)
            os.kill(pid_of(engine), signal.SIGSTOP)
            start = time.monotonic()
            await assert_all_died(tasks, "silent for")
            assert 0.9 <= time.monotonic() - start < 2.0
            await assert_dead(engine, pid_of(engine), "silent for")

    run(main())


def test_an_engine_that_stops_before_it_connects_is_given_up(tmp_path):
    never = (sys.executable, "-c", "import time; time.sleep(20)")

    async def main():
        watch = Watch(connect_s=0.3)
        async with running(model(tmp_path), watch=watch, command=never) as engine:
            with pytest.raises(EngineDied, match="did not connect"):
                await engine.info()
            await assert_dead(engine, pid_of(engine), "did not connect")

    run(main())


def test_a_long_step_whose_ops_go_on_is_not_silence(tmp_path):
    async def main():
        async with running(model(tmp_path)) as engine:
            start = time.monotonic()
            events = await collect(engine, "a", max_tokens=1, salt=b"long")
            assert time.monotonic() - start > 1.9  # nearly twice what counts as silence
            assert tokens(events) == [0]

    run(main())


@pytest.mark.parametrize("salt", [b"hang", b"hang in add"])
def test_an_engine_that_hangs_is_silent_although_it_answers_pings(tmp_path, salt):
    async def main():
        async with running(model(tmp_path)) as engine:
            start = time.monotonic()
            with pytest.raises(EngineDied, match="silent for"):
                await collect(engine, "a", salt=salt)
            assert 0.9 <= time.monotonic() - start < 2.5
            await assert_dead(engine, pid_of(engine), "silent for")

    run(main())


def test_an_idle_engine_and_one_that_loads_for_long_are_not_silent(tmp_path):
    async def main():
        async with running(model(tmp_path, load_s=1.2)) as engine:
            await engine.info()
            await asyncio.sleep(1.2)
            assert len(tokens(await collect(engine, "a"))) == 5

    run(main())


def test_a_front_end_that_stalls_does_not_take_the_engine_for_silent(tmp_path):
    async def main():
        async with running(model(tmp_path)) as engine:
            stream = engine.generate(request("a", max_tokens=10**6))
            await anext(stream)
            for _ in range(2):
                time.sleep(1.5)
                await asyncio.sleep(0.3)
            await anext(stream)
            await stream.aclose()
            assert len(tokens(await collect(engine, "b"))) == 5

    run(main())


def test_a_bug_in_the_loop_ends_the_process(tmp_path, capfd):
    async def main():
        async with running(model(tmp_path)) as engine:
            with pytest.raises(EngineDied, match="ended with status 1"):
                await collect(engine, "a", salt=b"bug")
            await assert_dead(engine, pid_of(engine), "ended with status 1")

    run(main())
    assert "RuntimeError: a bug in the loop" in capfd.readouterr().err


@pytest.mark.parametrize(
    "said",
    [
        b"\xff\xff\xff\xff",
        wire.HEADER.pack(3) + b"\xc1\xc1\xc1",
        wire.encode(wire.Abort("a")),
        wire.encode(wire.Failed("no such code", "")),
    ],
)
def test_an_engine_that_talks_nonsense_is_dead(tmp_path, said):
    script = (
        "import socket, sys, time; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[2]);"
        "s.sendall(bytes.fromhex(sys.argv[1])); time.sleep(20)"
    )

    async def main():
        command = (sys.executable, "-c", script, said.hex())
        engine = await NativeEngine.start(
            model(tmp_path), lambda done, total: None, child=spawn(command)
        )
        with pytest.raises(EngineDied):
            await asyncio.wait_for(engine.info(), 5)
        await until(lambda: is_reaped(pid_of(engine)), 1.0)
        with suppress(KeyError):
            await engine.close()

    run(main())


# ---- loading


@pytest.mark.parametrize(
    ("failure", "error", "message"),
    [
        ("config", ConfigError, "cpu.threads must be a whole number of at least 1, got 0"),
        ("artifact", ArtifactError, "model.safetensors: tensor 'a' is missing"),
        ("file", ArtifactError, "No such file or directory: 'config.json'"),
    ],
)
def test_what_keeps_an_engine_from_loading_is_told(tmp_path, failure, error, message, capfd):
    async def main():
        async with running(model(tmp_path, failure=failure)) as engine:
            for _ in range(2):
                with pytest.raises(error, match=message.replace("[", r"\[")):
                    await engine.info()
            await engine.died()
            for call in (engine.info(), collect(engine, "a"), engine.loads()):
                with pytest.raises(error, match=message):
                    await call
            await until(lambda: is_reaped(pid_of(engine)), 1.0)

    run(main())
    assert "Traceback" not in capfd.readouterr().err


def test_a_bug_while_loading_is_death(tmp_path, capfd):
    async def main():
        async with running(model(tmp_path, failure="bug")) as engine:
            with pytest.raises(EngineDied, match="ended with status 1"):
                await engine.info()

    run(main())
    assert "RuntimeError: a bug while loading" in capfd.readouterr().err


def test_progress_is_reported_while_loading(tmp_path):
    seen = []

    async def main():
        engine = await NativeEngine.start(
            model(tmp_path), lambda done, total: seen.append((done, total)), child=spawn(FAKE)
        )
        await engine.info()
        await engine.close()

    run(main())
    assert seen == [(0, 10), (10, 10)]


def test_a_bug_in_the_front_end_is_raised_by_close_and_nobody_waits_for_ever(tmp_path):
    def broken(done, total):
        raise ZeroDivisionError

    async def main():
        engine = await NativeEngine.start(model(tmp_path), broken, child=spawn(FAKE))
        with pytest.raises(EngineDied):
            await asyncio.wait_for(engine.info(), 5)
        with pytest.raises(ZeroDivisionError):
            await engine.close()
        assert is_reaped(pid_of(engine))

    run(main())


# ---- the socket, and what is left behind


def test_the_socket_is_private_and_gone_once_the_engine_has_connected(tmp_path, temporary):
    async def main():
        child = spawn(FAKE)
        [directory] = temporary.iterdir()
        [path] = directory.iterdir()
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        assert stat.S_ISSOCK(path.stat().st_mode) and stat.S_IMODE(path.stat().st_mode) == 0o600
        engine = await NativeEngine.start(
            model(tmp_path), lambda done, total: None, child=child, watch=WATCH
        )
        await engine.info()
        assert list(temporary.iterdir()) == []
        await engine.close()

    run(main())


def test_nothing_is_left_of_an_engine_that_ends_before_it_connects(tmp_path, temporary):
    async def main():
        async with running(model(tmp_path), command=(sys.executable, "-c", "exit(3)")) as engine:
            with pytest.raises(EngineDied, match="ended with status 3"):
                await engine.info()
            assert list(temporary.iterdir()) == []
            await until(lambda: is_reaped(pid_of(engine)), 1.0)

    run(main())


def test_nothing_is_left_of_a_child_that_is_discarded(temporary):
    child = spawn(FAKE)
    child.discard()
    assert list(temporary.iterdir()) == [] and is_reaped(child.process.pid)


def test_nothing_is_left_where_no_process_can_be_started(temporary):
    with pytest.raises(FileNotFoundError):
        spawn(("/no/such/program",))
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("wait_s", [None, 0.0, 0.05])
def test_an_engine_closed_while_it_starts_leaves_nothing(tmp_path, temporary, wait_s):
    async def main():
        engine = await NativeEngine.start(
            model(tmp_path), lambda done, total: None, child=spawn(FAKE)
        )
        if wait_s is not None:
            await asyncio.sleep(wait_s)
        await engine.close()
        assert list(temporary.iterdir()) == [] and is_reaped(pid_of(engine))

    run(main())


def test_close_ends_open_streams_and_leaves_no_zombie(tmp_path):
    async def main():
        async with running(model(tmp_path)) as engine:
            tasks = await streaming(engine, 3)
            start = time.monotonic()
            await engine.close()
            assert time.monotonic() - start < 1.0  # it went by itself
            assert is_reaped(pid_of(engine))
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, EngineDied)
            await engine.close()

    run(main())


def test_close_does_not_wait_for_a_step_that_hangs(tmp_path):
    async def main():
        async with running(model(tmp_path), watch=Watch()) as engine:
            task = asyncio.create_task(collect(engine, "a", salt=b"hang"))
            await asyncio.sleep(0.5)
            start = time.monotonic()
            await engine.close()
            assert time.monotonic() - start < 3.0
            assert is_reaped(pid_of(engine))
            with pytest.raises(EngineDied):
                await task

    run(main())


def test_two_engines_do_not_meet(tmp_path):
    async def main():
        one, two = (model(tmp_path, name, architecture=name) for name in ("one", "two"))
        async with running(one) as first, running(two) as second:
            assert [(await e.info()).architecture for e in (first, second)] == ["one", "two"]
            calls = (collect(first, "a", first=10), collect(second, "a", first=20))
            results = await asyncio.gather(*calls)
            assert [tokens(events)[0] for events in results] == [10, 20]
            os.kill(pid_of(first), signal.SIGKILL)
            await first.died()
            assert len(tokens(await collect(second, "b"))) == 5

    run(main())


def test_the_terminals_interrupt_does_not_reach_the_engine(tmp_path):
    async def main():
        async with running(model(tmp_path)) as engine:
            await engine.info()
            assert os.getpgid(pid_of(engine)) != os.getpgid(0)
            os.kill(pid_of(engine), signal.SIGINT)
            assert len(tokens(await collect(engine, "a"))) == 5

    run(main())


# ---- a front-end that dies

FRONT_END = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.engine import test_process as t

async def main():
    child = t.spawn(t.FAKE)
    print(child.process.pid, flush=True)
    if sys.argv[3] == "before":
        return await asyncio.sleep(1000)
    config = t.Config(model=Path(sys.argv[2]))
    engine = await t.NativeEngine.start(config, lambda done, total: None, child=child)
    if sys.argv[3] != "loading":
        await engine.info()
        task = asyncio.create_task(
            t.collect(engine, "a", max_tokens=10**6, salt=sys.argv[3].encode().strip())
        )
        await asyncio.sleep(0.3)
    print("go", flush=True)
    await asyncio.sleep(1000)

asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["before", "loading", " ", "hang", "long"])
def test_an_engine_is_gone_two_seconds_after_its_front_end(tmp_path, temporary, when):
    config = model(tmp_path, load_s=1000 if when == "loading" else 0)
    script = f"import tempfile; tempfile.tempdir = {str(temporary)!r}\n{FRONT_END}"
    words = [sys.executable, "-c", script, str(ROOT), str(config.model), when]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as front_end:
        pid = int(front_end.stdout.readline())
        if when != "before":
            assert front_end.stdout.readline() == b"go\n"
        assert is_alive(pid)
        front_end.kill()
        end = time.monotonic() + 2.0
        while is_alive(pid) and time.monotonic() < end:
            time.sleep(0.01)
        assert not is_alive(pid)
        assert b"Traceback" not in front_end.stderr.read()
    assert list(temporary.iterdir()) == []


# ---- the child alone


def talk(directory, said):
    """Exit status and last words of a child that is told `said`, with the socket left open."""
    with socket.socket(socket.AF_UNIX) as listener:
        path = directory / "s"
        listener.bind(str(path))
        listener.listen(1)
        words = [*FAKE, str(path)]
        with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as child:
            connected, _ = listener.accept()
            with connected:
                connected.sendall(said)
                try:
                    return child.wait(5), child.stderr.read()
                finally:
                    child.kill()


NONSENSE = {
    "too large": wire.HEADER.pack(wire.MAX_FRAME_BYTES + 1),
    "not msgpack": wire.HEADER.pack(3) + b"\xc1\xc1\xc1",
    "not a frame": wire.HEADER.pack(1) + b"\x01",
    "not to the engine": wire.encode(wire.Beat(False, 0)),
    "not first": wire.encode(wire.GetLoads(1)),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_a_child_that_is_told_nonsense_exits(temporary, name):
    status, words = talk(temporary, NONSENSE[name])
    assert status == 1
    assert words.startswith("vivace: engine: bad frame: ") and words.count("\n") == 1


def test_a_running_child_that_is_told_nonsense_exits(tmp_path, temporary):
    start = wire.encode(wire.Start(model(tmp_path)))
    status, words = talk(temporary, start + wire.HEADER.pack(2**32 - 1))
    assert status == 1 and "bad frame" in words


# ---- the real command


def test_the_real_child_says_what_is_wrong_with_a_model(tmp_path, monkeypatch):
    (tmp_path / "queue.py").write_text("raise RuntimeError('the working folder was imported')")
    monkeypatch.chdir(tmp_path)  # nothing in it is ever run

    async def main():
        engine = await NativeEngine.start(
            Config(model=tmp_path / "absent"), lambda done, total: None
        )
        with pytest.raises(ArtifactError, match="absent"):
            await engine.info()
        await engine.close()

    run(main())


def test_the_front_end_does_not_import_the_engine_itself():
    code = "import sys, vivace.engine.runtimes.native as n; print(*sys.modules)"
    words = [sys.executable, "-c", code]
    modules = subprocess.run(
        words, capture_output=True, text=True, check=True, cwd=ROOT / "src"
    ).stdout.split()
    assert not {"torch", "vivace.engine.core", "vivace.engine.process"} & set(modules)


def test_exactly_one_last_event_each_whoever_aborts(tmp_path):
    async def main():
        async with running(model(tmp_path)) as engine:
            tasks = [
                asyncio.create_task(collect(engine, f"r{i}", max_tokens=1 + i % 20))
                for i in range(100)
            ]
            for i in range(0, 100, 3):
                await asyncio.sleep(0.001)
                await engine.abort(f"r{i}")
            finishes = Counter()
            for events in await asyncio.gather(*tasks):
                assert [event.finish is not None for event in events].count(True) == 1
                finishes[events[-1].finish] += 1
            assert finishes[FinishReason.LENGTH] >= 60
            assert (await engine.loads()).num_running == 0

    run(main())
