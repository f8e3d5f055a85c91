"""`serving/running.py`: who may begin, and that nothing is left of who has ended."""

import asyncio
import gc
import io

import pytest

from vivace.engine.errors import Cancelled, Overloaded
from vivace.serving.request_log import RequestLog
from vivace.serving.running import Running, RunningRequests


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


def test_a_log_that_nobody_reads_ends_no_request():
    class Gone(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    running = RunningRequests(RequestLog(Gone()), max_requests=8)

    async def one():
        with running.run("Generate", None, None):
            return True

    assert asyncio.run(one())


def test_a_request_whose_last_message_is_on_its_way_is_not_aborted():
    running = requests()

    async def end():
        with running.run("Generate", "mine", None) as one:
            one.is_ending = True
            return running.abort("mine")

    assert not asyncio.run(end())
