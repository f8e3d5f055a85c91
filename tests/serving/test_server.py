"""The server before it is ready, when it is full and when it drains; what a handler sees of a client that has left."""

import asyncio
import signal
import socket
import subprocess
import sys
import textwrap
import time

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from tests.serving.http2 import Connection
from tests.serving.server_process import CHAT, MODEL, PROMPT, Server, serving, wait_until
from vivace.engine.errors import EngineDied
from vivace.serving.boundary import Boundary
from vivace.serving.client import AsyncClient, Client, VivaceError
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb
from vivace.serving.protos.vivace.v1 import inference_pb2_grpc as pb_grpc
from vivace.serving.server import close_all
from vivace.serving.status import SlowReader, TooLarge

LOADS_FOR_EVER = f"""
    import sys
    from pathlib import Path
    from vivace.engine.config import Config, ServerConfig
    from vivace.engine.runtimes.native import spawn
    from vivace.serving.server import run

    child = spawn((sys.executable, "-c", "import time; time.sleep(60)"))
    config = ServerConfig(port=int(sys.argv[1]))
    sys.exit(run(config, {{"slow": (Config(model=Path({str(MODEL)!r})), child)}}, print))
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_a_server_that_loads_is_not_serving_refuses_calls_and_can_be_stopped():
    port = free_port()
    script = textwrap.dedent(LOADS_FOR_EVER)
    process = subprocess.Popen([sys.executable, "-c", script, str(port)])
    try:
        with (
            grpc.insecure_channel(f"127.0.0.1:{port}") as channel,
            Client(f"127.0.0.1:{port}") as client,
        ):
            stub = health_pb2_grpc.HealthStub(channel)
            for service in ("", "vivace.v1.Inference"):
                request = health_pb2.HealthCheckRequest(service=service)
                status = stub.Check(request, timeout=10, wait_for_ready=True).status
                assert status == health_pb2.HealthCheckResponse.NOT_SERVING
            for call in (lambda: list(client.chat(CHAT)), client.loads, client.model_info):
                with pytest.raises(grpc.RpcError) as error:
                    call()
                assert error.value.code() is grpc.StatusCode.UNAVAILABLE
                assert "loading" in error.value.details()
            process.terminate()
            assert process.wait(5) == 0
    finally:
        process.kill()
        process.wait()


def test_a_full_server_refuses_with_a_time_to_wait_and_serves_those_it_took():
    with (
        serving("--max-running", "1", "--max-waiting", "2") as server,
        Client(server.target, max_retries=0) as client,
    ):
        running = client.generate(PROMPT, max_tokens=400, ignore_eos=True)
        next(running)
        waiting = [client.generate(PROMPT, max_tokens=2, ignore_eos=True) for _ in range(2)]
        wait_until(lambda: client.loads().num_waiting == 2)
        refused = client.generate(PROMPT)
        with pytest.raises(grpc.RpcError) as error:
            next(refused)
        assert error.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        trailers = dict(error.value.trailing_metadata())
        assert int(trailers["grpc-retry-pushback-ms"]) > 0
        for call in (running, *waiting):
            assert list(call)[-1].finish_reason == "length"


@pytest.mark.parametrize(
    ("error", "tries"), [(TooLarge("x"), 1), (SlowReader("x"), 1), (EngineDied("x"), 2)]
)
def test_what_may_be_tried_again_says_when_and_what_may_not_says_so(error, tries):
    """Clients try again by the status, which others share that may be."""

    class Refusing(pb_grpc.InferenceServicer):
        num_calls = 0

        async def GetLoads(self, request, context):
            self.num_calls += 1
            raise error

    async def run():
        boundary = Boundary(max_metadata_bytes=1 << 14)
        server, servicer = grpc.aio.server(interceptors=(boundary,)), Refusing()
        pb_grpc.add_InferenceServicer_to_server(servicer, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with AsyncClient(f"127.0.0.1:{port}", max_retries=1) as client:
            with pytest.raises(VivaceError) as ended:
                await client.loads()
        await server.stop(0)
        return ended.value.retry_after_s, servicer.num_calls

    assert asyncio.run(run()) == (None if tries == 1 else 0.25, tries)


def test_all_that_a_server_holds_is_closed_before_an_error_of_closing_is_raised():
    closed = []

    class Held:
        def __init__(self, error):
            self._error = error

        async def close(self):
            await asyncio.sleep(0)
            closed.append(self)
            if self._error is not None:
                raise self._error

    held = [Held(OSError("first")), Held(OSError("second")), Held(None)]
    with pytest.raises(OSError, match="first"):
        asyncio.run(close_all(held))
    assert closed == held


def test_ctrl_c_drains_too():
    with serving() as server, Client(server.target) as client:
        call = client.generate(PROMPT, max_tokens=100, ignore_eos=True)
        next(call)
        server.process.send_signal(signal.SIGINT)
        assert list(call)[-1].finish_reason == "length"
        code, errors = server.wait(10)
        assert code == 0 and "Traceback" not in errors


def test_requests_that_outlast_the_drain_end_unavailable_and_the_status_is_1():
    with serving("--set", "server.drain_s=0.3") as server, Client(server.target) as client:
        calls = [client.generate(PROMPT, max_tokens=1900, ignore_eos=True) for _ in range(2)]
        for call in calls:
            next(call)
        server.process.terminate()
        for call in calls:
            with pytest.raises(grpc.RpcError) as error:
                list(call)
            assert error.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "the server has stopped" in error.value.details()
        code, errors = server.wait(10)
        assert code == 1 and "Traceback" not in errors
        assert "server.drain_s (0.3)" in errors


def test_a_server_without_requests_drains_in_no_time():
    with serving("--set", "server.drain_s=0") as server:
        server.process.terminate()
        assert server.wait(10)[0] == 0


def test_a_draining_server_says_so_until_its_last_request_has_ended():
    with serving() as server, Client(server.target, max_retries=0) as client:
        with grpc.insecure_channel(server.target) as channel:
            request = health_pb2.HealthCheckRequest(service="vivace.v1.Inference")
            watch = health_pb2_grpc.HealthStub(channel).Watch(request)
            assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
            call = client.generate(PROMPT, max_tokens=200, ignore_eos=True)
            next(call)
            server.process.terminate()
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            for refused in (client.generate(PROMPT), client.chat(CHAT)):
                with pytest.raises(grpc.RpcError) as error:
                    list(refused)
                assert error.value.code() is grpc.StatusCode.UNAVAILABLE
                assert "draining" in error.value.details()
            assert server.process.poll() is None
            assert list(call)[-1].finish_reason == "length"
            watch.cancel()
        assert server.wait(10)[0] == 0


@pytest.mark.slow
def test_texts_that_are_tokenized_when_the_drain_begins_are_answered():
    with serving() as server, grpc.insecure_channel(server.target) as channel:
        stub = pb_grpc.InferenceStub(channel)
        stub.Tokenize(pb.TokenizeRequest(text="x"))
        request = pb.TokenizeRequest(text="hello you " * 200_000)  # of two seconds, each
        calls = [stub.Tokenize.future(request) for _ in range(3)]
        time.sleep(0.5)
        server.process.terminate()
        assert {len(call.result().token_ids) for call in calls} == {800_000}
        assert server.wait(10)[0] == 0


def test_who_watches_health_and_does_not_read_holds_up_nobody():
    health = "grpc.health.v1.Health"
    with (
        serving() as server,
        Client(server.target) as client,
        Connection(server.target, reads=False, window=0) as connection,
    ):
        connection.call("Watch", b"", service=health)
        busy = client.generate(PROMPT, max_tokens=300, ignore_eos=True)
        next(busy)
        server.process.terminate()
        wait_until(lambda: client.health() == "NOT_SERVING")
        assert list(busy)[-1].finish_reason == "length"
        assert server.wait(10)[0] == 0


def test_health_is_known_of_the_service_and_of_no_other(server):
    with grpc.insecure_channel(server.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        found = stub.List(health_pb2.HealthListRequest()).statuses
        assert {name: one.status for name, one in found.items()} == {
            "": 1,
            "vivace.v1.Inference": 1,
        }
        other = health_pb2.HealthCheckRequest(service="another")
        with pytest.raises(grpc.RpcError) as error:
            stub.Check(other)
        assert error.value.code() is grpc.StatusCode.NOT_FOUND
        watch = stub.Watch(other)
        assert next(watch).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
        watch.cancel()


def test_an_engine_that_refuses_its_settings_says_why():
    server = Server("--port", "0", "--max-context", "1000000")
    try:
        code, errors = server.wait(30)
        assert code == 1 and errors.count("\n") == 1
        assert errors.startswith(
            "vivace: error: model 'northstar': max_context_tokens must be in 2..2048"
        )
    finally:
        server.stop()


def test_the_limits_of_a_connection_are_settings():
    words = ("max_message_bytes=2KiB", "max_metadata_bytes=3KiB", "max_concurrent_streams=1")
    words = [word for one in words for word in ("--set", f"server.{one}")]
    with serving(*words) as server, grpc.insecure_channel(server.target) as channel:
        stub = pb_grpc.InferenceStub(channel)

        def code_of(text, metadata=()):
            request = pb.GenerateRequest(text=text, sampling=pb.SamplingParams(max_tokens=1))
            try:
                list(stub.Generate(request, metadata=metadata, timeout=30))
            except grpc.RpcError as error:
                return error.code()
            return grpc.StatusCode.OK

        assert code_of("x " * 900) is grpc.StatusCode.OK
        assert code_of("x " * 1100) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert code_of("x", [("some", "x" * 2000)]) is grpc.StatusCode.OK
        for _ in range(12):  # none slips through by chance
            assert code_of("x", [("some", "x" * 3000)]) is grpc.StatusCode.RESOURCE_EXHAUSTED
        sampling = pb.SamplingParams(max_tokens=1900, ignore_eos=True)
        first = stub.Generate(pb.GenerateRequest(text="x", sampling=sampling))
        next(first)
        with pytest.raises(grpc.RpcError) as error:
            stub.GetLoads(pb.GetLoadsRequest(), timeout=0.5)
        assert error.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        with Client(server.target) as another:
            assert another.loads(timeout=30).num_running == 1
        first.cancel()
        assert stub.GetLoads(pb.GetLoadsRequest(), timeout=30)


def test_a_client_that_reads_nothing_and_hangs_up_ends_its_handler():
    """Behind the real boundary: gRPC holds the response that nobody reads, and the handler waits inside it."""
    ended = asyncio.Event()

    class Endless(pb_grpc.InferenceServicer):
        async def Generate(self, request, context):
            try:
                while True:
                    await context.write(pb.GenerateResponse(text="x" * 100_000))
            finally:
                ended.set()

    async def run():
        server = grpc.aio.server(interceptors=(Boundary(max_metadata_bytes=1 << 14),))
        pb_grpc.add_InferenceServicer_to_server(Endless(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = pb_grpc.InferenceStub(channel).Generate(pb.GenerateRequest())
            await call.read()
            await asyncio.sleep(0.3)
            assert not ended.is_set()
            call.cancel()
            await asyncio.wait_for(ended.wait(), 2)
        await server.stop(0)

    asyncio.run(run())
