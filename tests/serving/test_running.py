"""`serving/running.py`: who may begin, and that nothing is left of who has ended."""

import asyncio
import gc
import io
import json
import os
from contextlib import suppress

import pytest

from vivace.engine.errors import Cancelled, Overloaded
from vivace.serving.request_log import RequestLog
from vivace.serving.running import Running, RunningRequests
from vivace.serving.status import NotReady, SlowReader


def requests(max_requests=8):
    return RunningRequests(RequestLog(io.StringIO()), max_requests=max_requests)


def alive():
    return [found for found in gc.get_objects() if type(found) is Running]


async def refused(running):
    with running.run("Generate", None, None) as one:  # its frame holds it, as a servicer's does
        raise Overloaded(f"no room for {one.id}")


async def ended(running):
    try:
        await asyncio.create_task(refused(running))
    except Overloaded:
        return True
    return False


def test_a_request_that_is_refused_leaves_nothing_to_the_garbage_collector():
    gc.collect()
    gc.disable()
    try:
        assert asyncio.run(ended(requests()))
        assert not alive()
    finally:
        gc.enable()


def test_half_of_the_room_is_left_to_parts_of_requests_that_run():
    running = requests(max_requests=4)

    def run(*, is_part=False):
        return running.run("Batch", None, None, is_part=is_part)

    async def fill():
        with run(), run():
            with pytest.raises(Overloaded, match="2 requests"), run():
                pass
            with run(is_part=True), run(is_part=True):
                with pytest.raises(Overloaded, match="4 requests"), run(is_part=True):
                    pass
                return True

    assert asyncio.run(fill())


def test_calls_that_run_no_model_have_a_bound_of_their_own(monkeypatch):
    monkeypatch.setattr("vivace.serving.running.MAX_ASIDE", 2)
    running = requests(max_requests=2)

    async def fill():
        running.drain()
        with (
            running.aside(),
            running.aside(),
            pytest.raises(Overloaded, match="2 calls"),
            running.aside(),
        ):
            pass
        with running.aside():
            return True

    assert asyncio.run(fill())

    async def beside_requests():
        others = requests(max_requests=2)
        with others.aside(), others.run("Generate", None, None):
            with pytest.raises(Overloaded, match="1 requests"), others.run("Generate", None, None):
                pass
            return True

    assert asyncio.run(beside_requests())


def test_a_call_that_runs_no_model_is_waited_for_and_ended_as_requests_are():
    log = io.StringIO()
    running = RunningRequests(RequestLog(log), max_requests=8)

    async def wait():
        with running.aside():
            await asyncio.sleep(60)

    async def end():
        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(running.wait_idle(), 0.01)
        running.abort_all(NotReady("the server has stopped"))
        with pytest.raises(NotReady):
            await task
        await running.wait_idle()
        return log.getvalue()

    assert asyncio.run(end()) == ""


@pytest.fixture(params=["broken", "closed"])
def log_nobody_reads(request):
    reads, writes = os.pipe()
    os.close(reads)
    out = os.fdopen(writes, "w", buffering=1)
    if request.param == "closed":
        with suppress(BrokenPipeError):
            out.write("\n")
        with suppress(BrokenPipeError):
            out.close()
    yield out
    with suppress(BrokenPipeError):
        out.close()


def test_a_log_that_nobody_reads_ends_no_request(log_nobody_reads):
    running = RunningRequests(RequestLog(log_nobody_reads), max_requests=8)

    async def serve():
        for _ in range(3):
            with running.run("Generate", "again", None):
                pass
        assert await ended(running)
        return True

    assert asyncio.run(serve())


class Stalled:
    """Takes the metadata, and no message."""

    def __init__(self):
        self.writes = asyncio.Event()

    async def send_initial_metadata(self, metadata):
        pass

    async def write(self, message):
        self.writes.set()
        await asyncio.sleep(60)


@pytest.mark.parametrize("is_last", [True, False])
def test_a_stalled_reader_of_the_last_message_gets_no_second_end(is_last):
    log = io.StringIO()
    running = RunningRequests(RequestLog(log), max_requests=8)

    async def serve(context):
        with running.run("Generate", "mine", None) as one:
            await one.write(context, "all", is_last=is_last)

    async def stall():
        context = Stalled()
        task = asyncio.create_task(serve(context))
        await context.writes.wait()
        if is_last:
            running.abort_all(NotReady("the server has stopped"))
            assert not running.abort("mine")
        watch = asyncio.create_task(running.end_stalled(0.05))
        await asyncio.wait((task,), timeout=10)
        watch.cancel()
        return task.exception()

    error = asyncio.run(stall())
    code = json.loads(log.getvalue())["code"]
    if is_last:
        assert (error, code) == (None, "OK")
    else:
        assert isinstance(error, SlowReader) and code == "RESOURCE_EXHAUSTED"


def test_a_request_is_ended_by_its_id_while_it_runs():
    running = requests()

    async def wait():
        with running.run("Generate", "mine", None):
            await asyncio.sleep(60)

    async def abort():
        task = asyncio.create_task(wait())
        await asyncio.sleep(0)
        assert running.abort("mine")
        assert not running.abort("mine")
        with pytest.raises(Cancelled):
            await task
        return not running.abort("mine")

    assert asyncio.run(abort())


def test_a_request_whose_last_message_is_on_its_way_is_not_aborted():
    running = requests()

    async def end():
        with running.run("Generate", "mine", None) as one:
            one.is_ending = True
            return running.abort("mine")

    assert not asyncio.run(end())
