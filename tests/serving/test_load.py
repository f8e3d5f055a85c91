"""Many at once, slow, late and gone clients: nobody waits for ever, nothing leaks, others do not notice."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from itertools import pairwise
from statistics import median

import grpc
import h2.events
import pytest

from tests.serving.http2 import Connection
from tests.serving.server_process import CHAT, PROMPT, serving, wait_until
from vivace.serving.client import AsyncClient, Client, Overloaded
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb
from vivace.serving.protos.vivace.v1 import inference_pb2_grpc as pb_grpc

LONG = pb.SamplingParams(max_tokens=1900, ignore_eos=True)


def is_free(client):
    loads = client.loads()
    return not (loads.num_running or loads.num_waiting or loads.num_blocks_used)


@pytest.mark.slow
def test_a_storm_of_1000_cancels_leaks_no_block(server, client):
    """Cancelled in the queue, in the prompt, in the reply."""
    codes = set()

    async def storm():
        async with AsyncClient(server.target) as fast:

            async def one(number):
                prompt = {"prompt_token_ids": [5 + number % 4000, *range(100, 300)]}
                stream = fast.generate(prompt, max_tokens=1500, ignore_eos=True)
                reading = asyncio.create_task(_read(stream, codes))
                await asyncio.sleep(0.002 * (number % 200))
                await stream.aclose()
                await reading
                assert await fast.health(timeout=5) == "SERVING"

            await asyncio.gather(*(one(number) for number in range(1000)))

    asyncio.run(storm())
    assert codes <= {grpc.StatusCode.CANCELLED, grpc.StatusCode.RESOURCE_EXHAUSTED}
    wait_until(lambda: is_free(client), 30)
    assert list(client.chat(CHAT, temperature=0))[-1].finish_reason == "stop"
    assert client.loads().cancel_to_free_s > 0


async def _read(stream, codes):
    """To its end: its own, or a refusal, or the hang-up. Notes the status of an error."""
    try:
        async for _ in stream:
            pass
    except grpc.RpcError as error:
        codes.add(error.code())
    except asyncio.CancelledError:
        return


@pytest.mark.slow
def test_a_burst_of_ten_times_what_fits_is_refused_with_a_time_to_wait():
    with (
        serving("--max-running", "4", "--max-waiting", "8") as server,
        Client(server.target) as client,
    ):

        async def burst():
            ends = []
            async with grpc.aio.insecure_channel(server.target) as channel:
                stub = pb_grpc.InferenceStub(channel)

                async def one():
                    call = stub.Generate(
                        pb.GenerateRequest(
                            text=PROMPT,
                            sampling=pb.SamplingParams(max_tokens=8, ignore_eos=True),
                        )
                    )
                    finishes = [response.HasField("finish") async for response in call]
                    ends.append(("OK", sum(finishes)))

                async def counted():
                    try:
                        await one()
                    except grpc.aio.AioRpcError as error:
                        ends.append((error.code(), dict(error.trailing_metadata())))

                await asyncio.gather(*(counted() for _ in range(120)))
            return ends

        ends = asyncio.run(burst())
        refused = [trailers for code, trailers in ends if code != "OK"]
        accepted = [count for code, count in ends if code == "OK"]
        assert len(accepted) >= 8 and len(refused) >= 60
        assert set(accepted) == {1}
        for code, trailers in ends:
            if code != "OK":
                assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert int(trailers["grpc-retry-pushback-ms"]) > 0
                assert b"google.rpc.RetryInfo" in trailers["grpc-status-details-bin"]
        wait_until(lambda: is_free(client))


@pytest.mark.parametrize("when", ["queue", "prefill", "decode"])
def test_a_deadline_is_the_end_wherever_it_comes(when):
    """Never a finish, partial or normal."""
    with serving("--max-running", "1") as server, Client(server.target) as client:
        if when == "queue":
            first = client.generate(PROMPT, max_tokens=1900, ignore_eos=True)
            next(first)
        prompt = [5] * (2000 if when == "prefill" else 5)
        timeout = 0.05 if when == "prefill" else 0.5
        call = client.generate(
            {"prompt_token_ids": prompt},
            max_tokens=40 if when == "prefill" else 1500,
            ignore_eos=True,
            timeout=timeout,
        )
        with pytest.raises(grpc.RpcError) as error:
            events = []
            events += call
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert not any(event.finish_reason for event in events)
        if when == "queue":
            wait_until(lambda: client.loads().num_waiting == 0)  # the client's clock ran out first
            assert client.loads().num_running == 1
            first.close()
        wait_until(lambda: is_free(client))


def test_a_reader_that_stalls_is_cut_and_others_do_not_notice():
    with (
        serving("--set", "server.stalled_reader_s=1") as server,
        Client(server.target) as client,
        Connection(server.target, reads=False) as connection,
    ):
        request = pb.GenerateRequest(
            text=PROMPT, sampling=LONG, response=pb.ResponseOptions(logprobs=20)
        )
        stream = connection.call("Generate", request.SerializeToString())
        drain_socket(connection)
        want = list(client.chat(CHAT, temperature=0))
        assert want[-1].finish_reason == "stop"
        wait_until(lambda: drain_socket(connection) or is_free(client), 20)
        assert client.loads().num_requests_aborted == 1
        connection.open_window(stream)
        status, words = connection.status(stream)
        assert (status, "not read" in words) == (8, True)
        assert list(client.chat(CHAT, temperature=0))[-1].finish_reason == "stop"


def waits(client):
    """Seconds from message to message of a stream."""
    stream = client.generate(PROMPT, max_tokens=150, ignore_eos=True)
    times = [time.monotonic() for _ in stream]
    return [after - before for before, after in pairwise(times)]


def test_a_reader_that_stalls_does_not_slow_the_streams_of_others():
    """They wait as long as beside one who reads; of three tries, for what else the machine has to do."""
    request = pb.GenerateRequest(
        text=PROMPT, sampling=LONG, response=pb.ResponseOptions(logprobs=20)
    )
    with serving("--set", "server.stalled_reader_s=10") as server, Client(server.target) as client:
        for _ in range(3):
            with ThreadPoolExecutor() as pool:
                reader = client.generate(PROMPT, max_tokens=1900, ignore_eos=True, logprobs=20)
                next(reader)
                reading = pool.submit(list, reader)
                usual = waits(client)
                reader.close()
                reading.result()
            with Connection(server.target, reads=False) as connection:
                connection.call("Generate", request.SerializeToString())
                has_stalled(connection)
                beside = waits(client)
                assert client.loads().num_running == 1  # it has not been cut
            wait_until(lambda: is_free(client))
            if median(beside) < 1.5 * median(usual) and max(beside) < max(0.2, 3 * max(usual)):
                return
        raise AssertionError((median(usual), max(usual), median(beside), max(beside)))


def has_stalled(connection):
    """Take what comes until nothing does any more."""
    connection.settimeout(0.5)
    with suppress(TimeoutError):
        while connection.receive() is not None:
            pass


def test_a_reader_that_takes_nothing_of_the_first_message_is_told_why():
    """Of which more is on the way than a window holds."""
    with (
        serving("--set", "server.stalled_reader_s=1") as server,
        Client(server.target) as client,
        Connection(server.target, reads=False) as connection,
    ):
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[5] * 1500),
            sampling=pb.SamplingParams(max_tokens=400, ignore_eos=True),
            response=pb.ResponseOptions(prompt_logprobs=20),
        )
        stream = connection.call("Generate", request.SerializeToString())
        wait_until(lambda: "RESOURCE_EXHAUSTED" in "".join(server.errors), 30)
        connection.open_window(stream)
        status, words = connection.status(stream)
        assert (status, "not read" in words) == (8, True)
        wait_until(lambda: is_free(client))


def messages(connection, stream, kind):
    """Those that a stream got."""
    data = (one for one in connection.events if isinstance(one, h2.events.DataReceived))
    body = b"".join(one.data for one in data if one.stream_id == stream)
    found = []
    while body:
        size = 5 + int.from_bytes(body[1:5], "big")
        found.append(kind.FromString(body[5:size]))
        body = body[size:]
    return found


@pytest.mark.parametrize("rpc", ["Generate", "Batch"])
def test_a_reader_that_stalls_on_the_last_message_gets_it_and_no_error(rpc):
    """A request has one final event."""
    with (
        serving("--set", "server.stalled_reader_s=1") as server,
        Connection(server.target, reads=False) as connection,
    ):
        request = pb.GenerateRequest(
            token_ids=pb.TokenIds(ids=[5] * 1500),
            sampling=pb.SamplingParams(max_tokens=1, ignore_eos=True),
            response=pb.ResponseOptions(prompt_logprobs=20),
        )
        if rpc == "Batch":
            request = pb.BatchRequest(items=[pb.BatchItem(generate=request)])
        num_lines = 2 if rpc == "Batch" else 1  # one for the item, too
        stream = connection.call(rpc, request.SerializeToString())
        wait_until(lambda: "".join(server.errors).count('"event": "request"') == num_lines, 30)
        connection.open_window(stream)
        assert connection.status(stream) == (0, "")
        if rpc == "Batch":
            [message] = messages(connection, stream, pb.BatchResponse)
            [reply] = message.response.replies
            assert reply.HasField("finish")
        else:
            [message] = messages(connection, stream, pb.GenerateResponse)
            assert message.HasField("finish")


def test_watchers_that_stall_leave_room_for_others():
    with (
        serving("--set", "server.stalled_reader_s=4") as server,
        Client(server.target, max_retries=0) as client,
        Connection(server.target, reads=False) as connection,
    ):
        request = pb.WatchLoadsRequest(interval_ms=10).SerializeToString()
        streams = [connection.call("WatchLoads", request) for _ in range(64)]
        wait_until(lambda: drain_socket(connection) or connection.begun() >= set(streams))
        assert not watches(client)
        wait_until(lambda: drain_socket(connection) or watches(client), 30)
        connection.open_window(streams[0])
        status, words = connection.status(streams[0])
        assert (status, "not read" in words) == (8, True)


def watches(client):
    """Whether the server lets one more watch the loads."""
    with closing(client.watch_loads(interval_ms=60_000)) as loads:
        try:
            return next(loads).num_blocks > 0
        except Overloaded:
            return False


def drain_socket(connection):
    """Take what has come, giving the server no more room."""
    connection.settimeout(0.1)
    try:
        connection.receive()
    except TimeoutError:
        return False
    return False


def test_pings_during_a_silent_call_are_welcome():
    """As many as a client sends in 50 minutes at one in ten seconds; too many pings would be a GOAWAY."""
    with (
        serving() as server,
        Connection(server.target) as connection,
        Client(server.target) as client,
    ):
        sampling = pb.SamplingParams(max_tokens=400, ignore_eos=True)
        request = pb.GenerateRequest(text=PROMPT, sampling=sampling)
        stream = connection.call("GenerateUnary", request.SerializeToString())
        for _ in range(300):
            connection.ping()
            connection.receive()
        assert client.loads().num_running + client.loads().num_waiting == 1
        assert not connection.goaways()
        connection.settimeout(60)
        assert connection.status(stream, 60)[0] == 0


def test_the_drain_has_a_limit():
    with serving("--set", "server.drain_s=1") as server, Client(server.target) as client:
        call = client.generate(PROMPT, max_tokens=1900, ignore_eos=True)
        next(call)
        server.process.terminate()
        with pytest.raises(grpc.RpcError) as error:
            list(call)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.wait(10)[0] == 1


LONG_PROMPT = pb.Prompt(token_ids=pb.TokenIds(ids=[5] * 1500))
LONG_REQUEST = pb.GenerateRequest(
    text=PROMPT, sampling=pb.SamplingParams(n=4, max_tokens=1900, ignore_eos=True)
)
WHOLE = {  # RPC that answers once all is done -> a request of many parts, of which none is over at once
    "GenerateUnary": LONG_REQUEST,
    "Batch": pb.BatchRequest(items=[pb.BatchItem(generate=LONG_REQUEST)] * 8),
    "Embed": pb.EmbedRequest(inputs=[LONG_PROMPT] * 256, options=pb.RequestOptions(cache_salt="a")),
    "Score": pb.ScoreRequest(
        prompt=LONG_PROMPT, continuations=[pb.Prompt(token_ids=pb.TokenIds(ids=[7] * 500))] * 256
    ),
}


@pytest.mark.parametrize("rpc", WHOLE)
def test_hanging_up_ends_all_parts_of_a_call(server, client, rpc):
    wait_until(lambda: is_free(client))
    with grpc.insecure_channel(server.target) as channel:
        call = getattr(pb_grpc.InferenceStub(channel), rpc)
        running = call(WHOLE[rpc]) if rpc == "Batch" else call.future(WHOLE[rpc])
        wait_until(lambda: client.loads().num_running)
        before = client.loads().num_requests_finished
        running.cancel()
        wait_until(lambda: is_free(client), 5)
        assert client.loads().num_requests_finished - before < 64


def test_aborts_reach_a_request_wherever_it_is(server, client):
    """In the queue of the engine, or all its replies."""
    calls = [
        client.generate(PROMPT, max_tokens=1900, ignore_eos=True, n=3, request_id=f"many-{i}")
        for i in range(3)
    ]
    ends = []

    def read(call):
        try:
            list(call)
        except grpc.RpcError as error:
            ends.append(error.code())

    threads = [threading.Thread(target=read, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    wait_until(lambda: client.loads().num_running >= 9)
    start = time.monotonic()
    assert all(client.abort(f"many-{i}") for i in range(3))
    for thread in threads:
        thread.join()
    assert ends == [grpc.StatusCode.CANCELLED] * 3 and time.monotonic() - start < 5
    wait_until(lambda: is_free(client))
