"""The engine's process seen from the front-end while all is well: streams, aborts, refusals, loading."""

import asyncio
from collections import Counter
from contextlib import aclosing, suppress

import pytest

from tests.engine.engine_process import (
    FAKE,
    collect,
    is_reaped,
    model,
    pid_of,
    request,
    run,
    running,
    tokens,
    until,
    until_running,
)
from tests.engine.fake_engine import logprobs, prompt_logprobs
from vivace.engine import wire
from vivace.engine.errors import ArtifactError, ConfigError, EngineDied, InvalidRequest, Overloaded
from vivace.engine.events import FinishReason
from vivace.engine.runtimes.native import NativeEngine, spawn


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
