"""The Python clients against a service that does as the test says: retries, deadlines, hang-ups."""

import asyncio
import gc
import math
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from tests.serving.fake_server import fake_server
from vivace.serving.client import (
    AsyncClient,
    Cancelled,
    Client,
    Completion,
    DeadlineExceeded,
    Overloaded,
    Unavailable,
    VivaceError,
)
from vivace.serving.client.errors import ERRORS

REFUSED = grpc.StatusCode.RESOURCE_EXHAUSTED
GONE = grpc.StatusCode.UNAVAILABLE
WAYS = ["stream", "unary", "async stream", "async unary"]
PUSHBACK_MS = 400  # more than the first backoff, jitter included


@pytest.fixture
def client(fake):
    with Client(fake.target) as client:
        yield client


def ask(way, target, prompt="x", *, timeout=None, **options):
    """The text of a reply, by each of the ways to get one."""

    async def ask_async():
        async with AsyncClient(target, **options) as client:
            if way == "async unary":
                return (await client.complete(prompt, timeout=timeout)).text
            return "".join([e.text async for e in client.generate(prompt, timeout=timeout)])

    if way.startswith("async"):
        return asyncio.run(ask_async())
    with Client(target, **options) as client:
        if way == "unary":
            return client.complete(prompt, timeout=timeout).text
        return "".join(event.text for event in client.generate(prompt, timeout=timeout))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("code", [REFUSED, GONE])
def test_a_refused_call_waits_as_long_as_the_server_says_and_is_tried_again(fake, way, code):
    fake.refusals = [(code, PUSHBACK_MS)]
    assert ask(way, fake.target) in ("ab", "x!")
    first, second = fake.times
    assert second - first > 0.9 * PUSHBACK_MS / 1e3


@pytest.mark.parametrize("way", WAYS)
def test_without_a_word_from_the_server_it_backs_off(fake, way):
    fake.refusals = [(GONE, None)]
    assert ask(way, fake.target) in ("ab", "x!")
    assert fake.times[1] - fake.times[0] > 0.1


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("refusal", "options", "tries", "retry_after_s"),
    [
        ((REFUSED, 20), {}, 4, 0.02),
        ((REFUSED, 20), {"max_retries": 1}, 2, 0.02),
        ((REFUSED, 20), {"max_retries": 0}, 1, 0.02),
        ((REFUSED, -1), {}, 1, None),
        ((REFUSED, 10**13), {}, 1, 1e10),  # 300 years
        ((grpc.StatusCode.INVALID_ARGUMENT, None), {}, 1, None),
    ],
)
def test_it_gives_up(fake, way, refusal, options, tries, retry_after_s):
    fake.refusals = [refusal] * 9
    with pytest.raises(VivaceError) as error:
        ask(way, fake.target, **options)
    assert len(fake.times) == tries
    assert (error.value.code(), error.value.details()) == (refusal[0], "not now")
    assert error.value.retry_after_s == retry_after_s


@pytest.mark.parametrize("way", WAYS)
def test_a_retry_that_would_pass_the_deadline_is_not_waited_for(fake, way):
    fake.refusals = [(REFUSED, 60_000)]
    started = time.monotonic()
    with pytest.raises(Overloaded) as error:
        ask(way, fake.target, timeout=20)
    assert error.value.retry_after_s == 60
    assert time.monotonic() - started < 10
    assert len(fake.times) == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_goes_away_between_tries_is_unavailable(way):
    with ThreadPoolExecutor() as pool:
        with fake_server() as (fake, target):
            fake.refusals = [(REFUSED, 500)]
            asking = pool.submit(ask, way, target, timeout=30)
            assert fake.ended.acquire(timeout=20)
        with pytest.raises(Unavailable):
            asking.result(20)


def test_a_stream_that_is_closed_between_tries_ends(fake, client):
    fake.refusals = [(REFUSED, 60_000)]
    stream = client.generate("x")
    with ThreadPoolExecutor() as pool:
        reading = pool.submit(list, stream)
        assert fake.ended.acquire(timeout=20)
        time.sleep(0.1)  # it has heard of it
        stream.close()
        assert reading.result(20) == []
    assert len(fake.times) == 1


@pytest.mark.parametrize("way", ["stream", "unary"])
def test_closing_the_client_ends_what_waits_for_another_try(fake, way):
    fake.refusals = [(REFUSED, 60_000)]
    client = Client(fake.target)
    calls = {"stream": lambda: list(client.generate("x")), "unary": lambda: client.complete("x")}
    with ThreadPoolExecutor() as pool:
        asking = pool.submit(calls[way])
        assert fake.ended.acquire(timeout=20)
        time.sleep(0.1)  # it has heard of it
        client.close()
        with pytest.raises(Cancelled, match="the client is closed"):
            asking.result(20)


@pytest.mark.parametrize("way", ["stream", "unary"])
def test_closing_the_async_client_ends_what_waits_for_another_try(fake, way):
    async def run():
        client = AsyncClient(fake.target)
        calls = {
            "stream": lambda: anext(client.generate("x")),
            "unary": lambda: client.complete("x"),
        }
        asking = asyncio.ensure_future(calls[way]())
        await asyncio.to_thread(fake.ended.acquire, timeout=20)
        await asyncio.sleep(0.1)  # it has heard of it
        await client.close()
        with pytest.raises(Cancelled, match="the client is closed"):
            await asking

    fake.refusals = [(REFUSED, 60_000)]
    asyncio.run(asyncio.wait_for(run(), 20))


def test_an_async_stream_that_is_closed_between_tries_ends(fake):
    async def run():
        async with AsyncClient(fake.target) as client:
            stream = client.generate("x")
            reading = asyncio.create_task(anext(stream, None))
            await asyncio.to_thread(fake.ended.acquire, timeout=20)
            await asyncio.sleep(0.1)  # it has heard of it
            await stream.aclose()
            return await reading

    fake.refusals = [(REFUSED, 60_000)]
    assert asyncio.run(asyncio.wait_for(run(), 20)) is None
    assert len(fake.times) == 1


@pytest.mark.parametrize("way", ["stream", "async stream"])
def test_a_stream_that_has_begun_is_never_begun_again(fake, way):
    with pytest.raises(Unavailable, match="broken"):
        ask(way, fake.target, "breaks")
    assert len(fake.times) == 1


@pytest.mark.parametrize("way", ["unary", "async stream"])
def test_a_server_that_comes_up_a_little_later_is_found(way):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    found = []
    asking = threading.Thread(target=lambda: found.append(ask(way, f"127.0.0.1:{port}")))
    asking.start()
    with fake_server(port):
        asking.join()
    assert found in (["ab"], ["x!"])


@pytest.mark.parametrize("way", ["unary", "async stream"])
def test_a_server_that_is_not_there_is_unavailable(way):
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(Unavailable):
        ask(way, f"127.0.0.1:{port}", max_retries=1)


@pytest.mark.parametrize("max_retries", [-1, 5])
def test_retries_are_bounded(max_retries):
    with pytest.raises(ValueError, match=rf"0\.\.4, got {max_retries}"):
        Client("127.0.0.1:1", max_retries=max_retries)


@pytest.mark.parametrize("way", WAYS)
def test_a_timeout_is_the_calls_own_or_else_the_clients(fake, way):
    ask(way, fake.target)
    ask(way, fake.target, timeout=500)
    with Client(fake.target, timeout=50) as client:
        for timeout in (None, 20, math.inf):
            client.complete("x", timeout=timeout)
    never, own, default, shorter, none = fake.left
    assert 400 < own < 501 and 40 < default < 51 and 10 < shorter < 21
    assert never == none > 1e9


@pytest.mark.parametrize("way", WAYS)
def test_a_call_ends_at_its_deadline(fake, way):
    with pytest.raises(DeadlineExceeded):
        ask(way, fake.target, "endless", timeout=0.3)
    assert fake.ended.acquire(timeout=5)


def close(stream):
    stream.close()


def leave(stream):
    with stream:
        pass


def forget(stream):
    del stream


@pytest.fixture
def without_collector():
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("num_refusals", [0, 1])
@pytest.mark.parametrize("way", [close, leave, forget])
def test_a_stream_that_is_given_up_is_cancelled(fake, client, without_collector, way, num_refusals):
    fake.refusals = [(REFUSED, 10)] * num_refusals
    way(next_of(client.generate("endless")))
    for _ in range(1 + num_refusals):
        assert fake.ended.acquire(timeout=5)


@pytest.mark.parametrize("num_refusals", [0, 1])
def test_a_watcher_that_closes_its_iterator_is_gone(fake, client, without_collector, num_refusals):
    fake.refusals = [(REFUSED, 10)] * num_refusals
    loads = client.watch_loads()
    assert next(loads).num_running == 7
    loads.close()
    for _ in range(1 + num_refusals):
        assert fake.ended.acquire(timeout=5)


@pytest.mark.parametrize("way", WAYS)
def test_a_message_that_is_too_large_is_sent_once(fake, monkeypatch, way):
    def backs_off(*_):
        raise AssertionError("it is to be tried again")

    monkeypatch.setattr(random, "uniform", backs_off)
    with pytest.raises(Overloaded, match="larger than max"):
        ask(way, fake.target, "x" * (5 << 20))
    assert fake.times == []


def test_a_call_of_a_closed_client_has_one_error(client):
    client.close()
    with pytest.raises(Cancelled, match="the client is closed") as error:
        client.complete("x")
    assert error.value.__cause__ is not error.value


def next_of(stream):
    """The stream, after its first event."""
    assert next(stream).text == "a"
    return stream


def test_a_loop_that_is_left_cancels_its_call(fake, client):
    for event in client.generate("endless"):
        assert event.text == "a"
        break
    assert fake.ended.acquire(timeout=5)


def test_a_closed_stream_is_over(fake, client):
    stream = next_of(client.generate("endless"))
    stream.close()
    stream.close()
    assert list(stream) == []


def test_a_stream_closed_by_another_thread_is_over(fake, client):
    stream = next_of(client.generate("endless"))
    timer = threading.Timer(0.1, stream.close)
    timer.start()
    assert list(stream) == []
    timer.join()


def test_closing_the_client_ends_its_calls_and_later_ones_cancelled(fake):
    client = Client(fake.target)
    stream = next_of(client.generate("endless"))
    client.close()
    with pytest.raises(Cancelled):
        next(stream)
    with pytest.raises(Cancelled, match="closed"):
        client.generate("x")
    with pytest.raises(Cancelled, match="closed"):
        client.complete("x")
    assert isinstance(client.batch(["x"])[0], Cancelled)


def run_async(fake, test):
    """Run a test of the asyncio client."""

    async def run():
        async with AsyncClient(fake.target) as client:
            await test(client)

    asyncio.run(asyncio.wait_for(run(), 20))


async def has_ended(fake):
    return await asyncio.to_thread(fake.ended.acquire, timeout=5)


def test_an_async_stream_that_is_given_up_is_cancelled(fake):
    async def test(client):
        async for event in client.generate("endless"):
            assert event.text == "a"
            break
        assert await has_ended(fake)
        async with client.generate("endless") as stream:
            await anext(stream)
        assert await has_ended(fake)
        assert [event async for event in stream] == []
        async for loads in client.watch_loads():
            assert loads.num_running == 7
            break
        gc.collect()
        assert await has_ended(fake)

    run_async(fake, test)


def test_a_cancelled_task_cancels_its_call(fake):
    async def test(client):
        stream = client.generate("endless")
        await anext(stream)
        calls = (
            (1, lambda: anext(stream)),
            (2, lambda: client.complete("endless")),
            (3, lambda: client.batch(["endless"])),
        )
        for number, start in calls:
            task = asyncio.ensure_future(start())
            await asyncio.sleep(0.05)
            while (
                len(fake.requests) < number
            ):  # a call that has not arrived would not be seen to end
                await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await has_ended(fake)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await client.complete("endless")
        assert await has_ended(fake)

    run_async(fake, test)


def test_an_async_stream_closed_by_another_task_is_over(fake):
    async def test(client):
        stream = client.generate("endless")
        await anext(stream)
        asyncio.get_running_loop().call_later(
            0.1, lambda: tasks.append(asyncio.ensure_future(stream.aclose()))
        )
        assert [event async for event in stream] == []
        await tasks[0]

    tasks = []
    run_async(fake, test)


def test_closing_the_async_client_ends_its_calls_and_later_ones_cancelled(fake):
    async def test(client):
        stream = client.generate("endless")
        await anext(stream)
        whole = asyncio.ensure_future(client.complete("endless"))
        many = asyncio.ensure_future(client.batch(["endless", "x"]))
        await asyncio.sleep(0.1)
        await client.close()
        for waits in (anext(stream), whole, client.complete("x")):
            with pytest.raises(Cancelled, match="closed"):
                await waits
        with pytest.raises(Cancelled, match="closed"):
            client.generate("x")
        assert [type(outcome) for outcome in await many] == [Cancelled, Completion]

    run_async(fake, test)


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.value[0]])
def test_every_status_is_an_error_that_gRPC_code_can_read_too(fake, code):
    fake.refusals = [(code, -1)]
    with Client(fake.target) as client, pytest.raises(grpc.RpcError) as error:
        client.complete("x")
    assert type(error.value) is ERRORS.get(code, VivaceError)
    assert (error.value.code(), error.value.details()) == (code, "not now")
    assert str(error.value) == f"{code.name}: not now"
    assert dict(error.value.trailing_metadata()) == {"grpc-retry-pushback-ms": "-1"}


def test_a_batch_without_end_outlasts_the_time_that_others_get(fake):
    with Client(fake.target, timeout=5) as client:
        client.batch(["a"], timeout=math.inf)
        client.batch(["a"])
    unbounded, bounded = fake.left
    assert unbounded is None or unbounded > 1e6
    assert bounded < 6  # what a header says may be rounded up
