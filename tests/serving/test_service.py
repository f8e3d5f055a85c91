"""The API as a stranger meets it: every field, the standard services, the proto on its own."""

import asyncio
import fcntl
import io
import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_tools import protoc

from tests.serving.server_process import CHAT, MODEL, PROMPT, serving, wait_until
from vivace.serving import convert
from vivace.serving.boundary import Boundary
from vivace.serving.client import AsyncClient, Client
from vivace.serving.protos import generate
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb
from vivace.serving.protos.vivace.v1 import inference_pb2_grpc as pb_grpc

PROTOS = Path(generate.__file__).parent


@pytest.fixture
def channel(server):
    with grpc.insecure_channel(server.target) as channel:
        yield channel


@pytest.fixture
def stub(channel):
    return pb_grpc.InferenceStub(channel)


def refusal(call):
    """Status and details of a call that fails."""
    with pytest.raises(grpc.RpcError) as error:
        list(call)
    return error.value.code(), error.value.details()


def fill(message, field):
    """Set a field to something, whatever its type is."""
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        value_field = field.message_type.fields_by_name["value"]
        getattr(message, field.name)["1" if field.message_type.fields[0].type == 9 else 1] = (
            "1" if value_field.type == value_field.TYPE_STRING else 1
        )
    elif field.message_type is not None:
        place = getattr(message, field.name)
        place.add() if field.is_repeated else place.SetInParent()
    else:
        value = {"string": "x", "bool": True}.get(
            {field.TYPE_STRING: "string", field.TYPE_BOOL: "bool"}.get(field.type), 1
        )
        if field.is_repeated:
            getattr(message, field.name).append(value)
        else:
            setattr(message, field.name, value)


def unserved():
    """Every field of every request message that the server does not read, with the path to it."""
    places = {
        "GenerateRequest": ((pb.GenerateRequest, ""),),
        "ChatRequest": ((pb.ChatRequest, ""),),
        "SamplingParams": ((pb.GenerateRequest, "sampling"), (pb.ChatRequest, "sampling")),
        "ResponseOptions": ((pb.GenerateRequest, "response"),),
        "RequestOptions": ((pb.GenerateRequest, "options"), (pb.ChatRequest, "options")),
    }
    for name, where in places.items():
        for request, path in where:
            message = pb.DESCRIPTOR.message_types_by_name[name]
            for field in message.fields:
                if field.name not in convert.SERVED[name]:
                    yield pytest.param(
                        request, path, field, id=f"{request.__name__}.{path}.{field.name}"
                    )


@pytest.mark.parametrize(("kind", "path", "field"), list(unserved()))
def test_a_field_that_is_not_served_ends_unimplemented_by_name(stub, kind, path, field):
    request = (
        kind(messages=[pb.ChatMessage(role="user", content="x")])
        if kind is pb.ChatRequest
        else kind(text="x")
    )
    fill(getattr(request, path) if path else request, field)
    call = stub.Chat if kind is pb.ChatRequest else stub.Generate
    code, details = refusal(call(request))
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert field.name in details


def test_unset_differs_from_zero(stub):
    request = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(max_tokens=2))
    assert list(stub.Generate(request))[-1].finish.usage.completion_tokens <= 2
    for name in ("top_p", "max_tokens", "n"):
        request = pb.GenerateRequest(text="x", sampling=pb.SamplingParams(**{name: 0}))
        code, details = refusal(stub.Generate(request))
        assert code in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.UNIMPLEMENTED)
        assert name in details and "0" in details


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (pb.GenerateRequest(), "prompt must be set"),
        (pb.GenerateRequest(text=""), "at least one token"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), "at least one token"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[-1])), "-1"),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[2**40])), str(2**40)),
        (pb.GenerateRequest(text="x", request_id="a\nb"), "request_id"),
        (pb.GenerateRequest(text="x", request_id="\x1b[31m"), "request_id"),
        (pb.GenerateRequest(text="x", request_id="a" * 129), "request_id"),
        (pb.GenerateRequest(text="x", request_id=""), "request_id"),
        (pb.GenerateRequest(text="x", sampling=pb.SamplingParams(stop=[""])), "stop"),
        (pb.GenerateRequest(text="x", sampling=pb.SamplingParams(stop=["a"] * 10_000)), "10000"),
        (
            pb.GenerateRequest(text="x", sampling=pb.SamplingParams(seed=1, min_p=float("inf"))),
            "min_p",
        ),
        (pb.GenerateRequest(text="x", response=pb.ResponseOptions(logprobs=10**9)), "logprobs"),
        (pb.GenerateRequest(text="x", sampling=pb.SamplingParams(top_k=2**40)), f"{2**40}"),
    ],
)
def test_a_bad_request_is_refused_by_name(stub, request_, words):
    code, details = refusal(stub.Generate(request_))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert words in details and "/" not in details.replace("/4", "")


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"allowed_token_ids": range(50_000)}, "allowed_token_ids"),
        ({"bad_words": ["😀" * 50_000]}, "bad_words"),
        ({"model": "m" * 100_000}, "model"),
        ({"request_id": "i" * 100_000}, "request_id"),
    ],
)
def test_a_huge_value_is_refused_in_few_words(client, params, name):
    """Details travel as a header: one too long would hide the status behind another."""
    code, details = refusal(client.generate("x", **params))
    assert code in (
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.NOT_FOUND,
        grpc.StatusCode.INVALID_ARGUMENT,
    )
    assert name in details and len(details) < 1000


def test_a_chat_without_messages_is_refused(stub):
    code, details = refusal(stub.Chat(pb.ChatRequest()))
    assert (code, "messages" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)


def test_an_id_in_use_is_refused_and_the_first_goes_on(client):
    first = client.generate(PROMPT, max_tokens=200, ignore_eos=True, request_id="twice")
    next(first)
    code, _ = refusal(client.generate(PROMPT, request_id="twice"))
    assert code is grpc.StatusCode.ALREADY_EXISTS
    assert list(first)[-1].finish_reason == "length"


def test_an_abort_by_id_ends_the_stream_cancelled(client):
    call = client.generate(PROMPT, max_tokens=1900, ignore_eos=True, request_id="abort-me")
    next(call)
    assert client.abort("abort-me") and not client.abort("nobody")
    assert refusal(call)[0] is grpc.StatusCode.CANCELLED


def test_a_message_over_the_limit_is_refused(client):
    assert refusal(client.generate("x" * (5 << 20)))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_stop_strings_over_the_wire(client):
    whole = "".join(event.text for event in client.chat(CHAT, temperature=0))
    stop = whole[10:14]
    events = list(client.chat(CHAT, temperature=0, stop=["never said", stop]))
    assert "".join(event.text for event in events) == whole[: whole.index(stop)]
    assert (events[-1].finish_reason, events[-1].stop_reason) == ("stop", stop)


def test_infos_say_what_is_served(client):
    model, server = client.model_info(), client.server_info()
    assert (model.name, model.architecture) == ("northstar", "Qwen3ForCausalLM")
    assert (model.num_parameters, model.has_chat_template) == (7_607_552, True)
    assert list(model.eos_token_ids) == [4091, 4089]
    assert model.default_sampling.temperature == pytest.approx(0.7)
    assert server.backend == "cpu" and server.uptime_s > 0 and server.num_blocks > 0


def test_the_log_says_how_each_request_ended(server, client):
    refusal(client.generate(PROMPT, temperature=9, request_id="log-bad"))
    list(client.generate(PROMPT, max_tokens=3, ignore_eos=True, request_id="log-good"))
    call = client.generate(PROMPT, max_tokens=1900, ignore_eos=True, request_id="log-gone")
    next(call)
    call.close()
    refusal(
        client.generate(
            PROMPT, max_tokens=1900, ignore_eos=True, request_id="log-late", timeout=0.3
        )
    )

    def records():
        lines = [line for line in server.errors if '"event": "request"' in line]
        return {one["id"]: one for one in map(json.loads, lines)}

    wait_until(lambda: {"log-bad", "log-good", "log-gone", "log-late"} <= set(records()))
    found = records()
    assert found["log-bad"]["code"] == "INVALID_ARGUMENT"
    assert found["log-gone"]["code"] == "CANCELLED"
    assert found["log-late"]["code"] == "DEADLINE_EXCEEDED"
    good = found["log-good"]
    assert (good["code"], good["reason"], good["completion_tokens"]) == ("OK", "length", 3)
    assert good["prompt_tokens"] > 0 and good["total_ms"] >= good["first_token_ms"] > 0


def test_health_can_be_watched_from_the_start_to_the_end():
    with serving() as server, grpc.insecure_channel(server.target) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(service="vivace.v1.Inference"))
        serving_now = health_pb2.HealthCheckResponse.SERVING
        assert next(watch).status == serving_now
        assert stub.Check(health_pb2.HealthCheckRequest()).status == serving_now
        with Client(server.target) as client:
            call = client.generate(PROMPT, max_tokens=200, ignore_eos=True)
            next(call)
            server.process.terminate()
            assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
            list(call)


def test_health_answers_while_the_engine_computes(server, client, channel):
    stub = health_pb2_grpc.HealthStub(channel)
    calls = [client.generate({"prompt_token_ids": [7 + i] * 1200}, max_tokens=2) for i in range(3)]
    threads = [threading.Thread(target=list, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for _ in range(20):
        stub.Check(health_pb2.HealthCheckRequest(), timeout=0.5)
    for thread in threads:
        thread.join()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_lists_the_services_and_describes_them(channel, version):
    if version == "v1alpha":
        method = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo
    else:
        method = channel.stream_stream(
            "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
            request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
            response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
        )
    ask = reflection_pb2.ServerReflectionRequest
    [listed] = method(iter([ask(list_services="")]))
    names = [service.name for service in listed.list_services_response.service]
    assert set(names) == {
        "vivace.v1.Inference",
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    pool = descriptor_pool.DescriptorPool()
    for found in method(iter([ask(file_containing_symbol=name) for name in names])):
        for proto in found.file_descriptor_response.file_descriptor_proto:
            pool.AddSerializedFile(proto)
    methods = {name: set(pool.FindServiceByName(name).methods_by_name) for name in names}
    assert "Chat" in methods["vivace.v1.Inference"]
    assert methods[f"grpc.reflection.{version}.ServerReflection"] == {"ServerReflectionInfo"}


def test_regenerating_the_code_changes_nothing(tmp_path):
    generate.generate(tmp_path)
    for path in (tmp_path / "vivace" / "v1").iterdir():
        assert path.read_text() == (PROTOS / "vivace" / "v1" / path.name).read_text(), path.name


def test_protoc_works_plainly(tmp_path):
    words = ["protoc", f"-I{PROTOS}", f"--python_out={tmp_path}", "vivace/v1/inference.proto"]
    assert protoc.main(words) == 0
    assert (tmp_path / "vivace" / "v1" / "inference_pb2.py").is_file()


def test_every_scalar_of_the_proto_can_be_unset():
    for message in pb.DESCRIPTOR.message_types_by_name.values():
        for field in message.fields:
            assert field.is_repeated or field.has_presence, f"{message.name}.{field.name}"


def test_the_client_needs_neither_numpy_nor_torch_nor_the_engine():
    code = (
        "import sys, vivace.serving.client;"
        "sys.exit(any(n in sys.modules for n in ('numpy', 'torch', 'vivace.engine', 'tokenizers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("method", ["Chat", "Generate", "Abort", "GetLoads"])
def test_bytes_that_are_no_protobuf_are_an_invalid_argument(channel, client, method):
    kind = channel.unary_stream if method in ("Chat", "Generate") else channel.unary_unary
    call = kind(f"/vivace.v1.Inference/{method}", request_serializer=bytes)
    with pytest.raises(grpc.RpcError) as error:
        list(call(b"\x0a\xff\xff\xff"))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert client.health() == "SERVING"


def bug():
    """The error of a call of a servicer with a bug, behind the real boundary."""

    class Buggy(pb_grpc.InferenceServicer):
        async def Chat(self, request, context):
            await context.write(pb.GenerateResponse(text="so far"))
            raise KeyError("/secret/path")

        async def GetLoads(self, request, context):
            return pb.GetLoadsResponse(num_running=1)

    async def run():
        server = grpc.aio.server(interceptors=(Boundary(max_metadata_bytes=1 << 14),))
        pb_grpc.add_InferenceServicer_to_server(Buggy(), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        async with AsyncClient(f"127.0.0.1:{port}") as client:
            chat = client.chat(CHAT)
            assert (await anext(chat)).text == "so far"
            with pytest.raises(grpc.RpcError) as error:
                await anext(chat)
            assert (await client.loads()).num_running == 1
        await server.stop(0)
        return error.value

    return asyncio.run(run())


def test_a_bug_is_internal_for_that_call_alone_and_says_nothing_of_the_inside(capsys):
    error = bug()
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in error.details()
    assert "secret" in capsys.readouterr().err


def test_a_bug_is_internal_where_nobody_reads_the_log_too(monkeypatch):
    class Broken(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Broken())
    assert bug().code() is grpc.StatusCode.INTERNAL


def test_a_server_whose_stderr_nobody_reads_serves():
    words = [sys.executable, "-m", "vivace", "serve", str(MODEL), "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        target = process.stdout.readline().split()[-1]
        process.stderr.close()
        with Client(target, max_retries=0) as client:
            for _ in range(3):
                assert client.complete("x", max_tokens=1, ignore_eos=True).replies
                code, _ = refusal(client.generate("x", temperature=9))
                assert code is grpc.StatusCode.INVALID_ARGUMENT
            process.terminate()
            assert process.wait(10) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_server_whose_log_is_held_up_serves_on_and_says_what_was_lost():
    """A pipe that is full: somebody has it open, and does not read."""
    words = [sys.executable, "-m", "vivace", "serve", str(MODEL), "--port", "0"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        fcntl.fcntl(process.stderr, fcntl.F_SETPIPE_SZ, 16 << 10)  # of 60 lines
        target = process.stdout.readline().split()[-1]
        with Client(target, timeout=20, max_retries=0) as client:
            for number in range(100):
                code, _ = refusal(client.generate("x", temperature=9, request_id=f"held-{number}"))
                assert code is grpc.StatusCode.INVALID_ARGUMENT
            assert client.health() == "SERVING"
            lines = iter(process.stderr.readline, "")
            read = [next(lines) for _ in range(5)]
            assert "held-0" in "".join(read)
            refusal(client.generate("x", temperature=9, request_id="read-again"))
            read += itertools.takewhile(lambda line: "read-again" not in line, lines)
            process.terminate()
            assert process.wait(10) == 0
        records = [json.loads(line) for line in read if line.startswith("{")]
        [lost] = [one["lines"] for one in records if one["event"] == "lost"]
        assert lost + sum(one["event"] == "request" for one in records) == 100
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def test_the_asyncio_client_streams_and_hangs_up(server):
    async def run():
        async with AsyncClient(server.target) as client:
            events = [event async for event in client.chat(CHAT, temperature=0)]
            assert events[-1].finish_reason == "stop"
            stream = client.generate(PROMPT, max_tokens=1900, ignore_eos=True)
            await anext(stream)
            await stream.aclose()
            assert await client.health() == "SERVING"
            while (await client.loads()).num_running:
                await asyncio.sleep(0.02)
            assert (await client.loads()).num_blocks_used == 0

    asyncio.run(asyncio.wait_for(run(), 20))


def test_an_unknown_parameter_is_a_type_error_naming_it(client):
    with pytest.raises(TypeError, match="temprature"):
        client.generate("x", temprature=1)
