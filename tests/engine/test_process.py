"""The engine's process: every way to die, who notices, and what is left behind."""

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.engine.engine_process import (
    FAKE,
    WATCH,
    collect,
    is_alive,
    is_reaped,
    model,
    pid_of,
    request,
    run,
    running,
    streaming,
    tokens,
    until,
)
from vivace.engine import wire
from vivace.engine.config import Config
from vivace.engine.errors import ArtifactError, EngineDied
from vivace.engine.runtimes.native import NativeEngine, Watch, spawn

ROOT = Path(__file__).parents[2]


async def assert_dead(engine, pid, reason):
    """Everything says so, and nothing is left of the process."""
    assert reason in await asyncio.wait_for(engine.died(), 1.0)
    for call in (engine.info(), engine.loads(), collect(engine, "later")):
        with pytest.raises(EngineDied, match=reason):
            await asyncio.wait_for(call, 1.0)
    assert not await engine.abort("a")
    await until(lambda: is_reaped(pid), 1.0)


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


FRONT_END = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from tests.engine import engine_process as t

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
