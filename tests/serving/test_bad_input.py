"""What hostile, broken and old clients send, through the real port: refused by name, never UNKNOWN or INTERNAL."""

import json
import re
import struct
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2

from tests.serving.fuzz import FORBIDDEN, GOOD, MAX_GROWTH_MIB, Fuzzer, resident_mib
from tests.serving.http2 import Connection
from tests.serving.server_process import wait_until
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb

FIXTURES = Path(__file__).parent / "fixtures"
INVALID = grpc.StatusCode.INVALID_ARGUMENT
LIMIT = 4 << 20  # bytes of a message
NAN, INF = float("nan"), float("inf")
HOSTILE = [  # parameter, value
    *(("n", value) for value in (2**31 - 1, -1, 0, 65)),
    *(("best_of", value) for value in (2**31 - 1, -1, 0, 65)),
    *(("top_k", value) for value in (-1, -(2**63), 2**31)),
    *(("temperature", value) for value in (NAN, INF, -INF, 5e-324, 1e-310, -0.5, 2.1)),
    *(("top_p", value) for value in (NAN, 0.0, -1.0, 1.01, INF)),
    *(("min_p", value) for value in (NAN, -0.1, 1.1)),
    *(("presence_penalty", value) for value in (NAN, INF, -2.1, 2.1)),
    *(("frequency_penalty", value) for value in (NAN, INF, -2.1, 2.1)),
    *(("repetition_penalty", value) for value in (NAN, INF, 0.0, -1.0, 10.1)),
    *(("max_tokens", value) for value in (0, -1, -(2**63))),
    *(("min_tokens", value) for value in (-1, 2**63 - 1)),
    ("logit_bias", {4096: 1.0}),
    ("logit_bias", {5: NAN}),
    ("logit_bias", {5: 101.0}),
    ("allowed_token_ids", [-1]),
    ("bad_token_ids", [2**40]),
    ("stop_token_ids", [2**63 - 1]),
]


@pytest.fixture
def call(server):
    """Calls an RPC with bytes or a message; gives its status and details."""
    with grpc.insecure_channel(server.target) as channel:

        def one(method, message, **options):
            streams = pb.DESCRIPTOR.services_by_name["Inference"].methods_by_name[method]
            kind = channel.unary_stream if streams.server_streaming else channel.unary_unary
            data = message if isinstance(message, bytes) else message.SerializeToString()
            try:
                found = kind(f"/vivace.v1.Inference/{method}", request_serializer=bytes)(
                    data, **options
                )
                list(found) if streams.server_streaming else None
            except grpc.RpcError as error:
                return error.code(), error.details()
            return grpc.StatusCode.OK, ""

        yield one


def generate(**sampling):
    sampling.setdefault("max_tokens", 2)
    return pb.GenerateRequest(text="Hello", sampling=pb.SamplingParams(**sampling))


@pytest.mark.parametrize(("field", "value"), HOSTILE)
def test_a_parameter_out_of_range_is_refused_by_name_value_and_range(call, field, value):
    code, details = call("GenerateUnary", generate(**{field: value}))
    assert (code, field in details) == (INVALID, True), details
    values = [one for pair in value.items() for one in pair] if isinstance(value, dict) else value
    given = values if isinstance(values, list) else [values]
    assert any(f"got {one!r}" in details for one in given), details
    assert re.search(
        r" in ([\[(]-?\d|-?\d+\.\.)| at (least|most) \d| at most max_tokens \(", details
    )


def test_hostile_parameters_are_refused_in_10_ms(server, call):
    """By the server's own clock; the best of five, for what else the machine has to do."""
    requests = [generate(**{field: value}) for field, value in HOSTILE]
    requests.append(pb.GenerateRequest(text="x", response=pb.ResponseOptions(logprobs=10**9)))
    for number, request in enumerate(requests):
        for _ in range(5):
            request.request_id = f"hostile-{number}"
            assert call("GenerateUnary", request)[0] is INVALID

    def times():
        lines = [json.loads(line) for line in list(server.errors) if '"hostile-' in line]
        return [
            [line["total_ms"] for line in lines if line["id"] == f"hostile-{number}"]
            for number in range(len(requests))
        ]

    wait_until(lambda: all(len(found) == 5 for found in times()))
    assert max(map(min, times())) < 10


def test_hostile_parameters_allocate_nothing(server, call):
    requests = [generate(n=2**31 - 1), generate(best_of=2**31 - 1), generate(top_k=-1)]
    requests.append(pb.GenerateRequest(text="x", response=pb.ResponseOptions(logprobs=10**9)))
    for request in requests:
        call("GenerateUnary", request)
    pids = (server.process.pid, server.engine_pid())
    before = [resident_mib(pid) for pid in pids]
    for _ in range(50):
        for request in requests:
            assert call("GenerateUnary", request)[0] is INVALID
    for pid, mib in zip(pids, before, strict=True):
        assert resident_mib(pid) - mib < 4


@pytest.mark.parametrize("field", ["top_p", "n", "max_tokens"])
def test_zero_is_an_error_where_unset_is_a_default(call, field):
    assert call("GenerateUnary", generate())[0] is grpc.StatusCode.OK
    code, details = call("GenerateUnary", generate(**{field: 0}))
    assert code is INVALID and field in details and "0" in details


@pytest.mark.parametrize("field", ["temperature", "top_k", "min_p", "min_tokens", "seed"])
def test_zero_is_a_value_where_it_means_something(call, field):
    assert call("GenerateUnary", generate(**{field: 0}))[0] is grpc.StatusCode.OK


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "at least one token"),
        ([4096], "4096"),
        ([-1], "-1"),
        ([2**63 - 1], str(2**63 - 1)),
        ([5] * 2048, "2048"),
        ([5] * 2049, "2049"),
    ],
)
def test_a_prompt_that_cannot_be_is_refused(call, ids, words):
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=ids))
    code, details = call("GenerateUnary", request)
    assert (code, words in details) == (INVALID, True), details


def test_the_longest_prompt_and_the_most_tokens_are_served(call):
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[5] * 2047), sampling=pb.SamplingParams(max_tokens=2**63 - 1)
    )
    assert call("GenerateUnary", request)[0] is grpc.StatusCode.OK


@pytest.mark.parametrize(
    "stop", [["a"] * 10_000, ["a" * (1 << 20)], [""], ["ok", ""], ["a"] * 17, ["é" * 257]]
)
def test_bad_stop_strings_are_refused(call, stop):
    code, details = call("GenerateUnary", generate(stop=stop))
    assert code is INVALID and "stop" in details and len(details) < 1000


@pytest.mark.parametrize(
    ("size", "code"), [(LIMIT, INVALID), (LIMIT + 1, grpc.StatusCode.RESOURCE_EXHAUSTED)]
)
def test_a_message_may_be_as_long_as_the_limit(call, size, code):
    """A field that nobody knows fills it up, so that the limit is all that is met: the prompt is what is missing."""
    length = size - 1 - 5
    key = struct.pack("B", 15 << 3 | 2)
    data = key + varint(length, 5) + b"x" * length
    assert len(data) == size
    assert call("Generate", data)[0] is code


def varint(value, size):
    """Padded to so many bytes."""
    return bytes((value >> 7 * i & 0x7F) | (0x80 if i < size - 1 else 0) for i in range(size))


def test_a_decompression_bomb_is_refused_and_takes_no_memory(server, call):
    bomb = pb.GenerateRequest(text="a" * (100 << 20)).SerializeToString()
    before = resident_mib(server.process.pid)
    code, _ = call("Generate", bomb, compression=grpc.Compression.Gzip)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert resident_mib(server.process.pid) - before < 20
    assert call("Generate", generate(), compression=grpc.Compression.Gzip)[0] is grpc.StatusCode.OK


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x-big", b"v" * 64_000)],
        [(b"x-%d" % i, b"v") for i in range(10_000)],
        [(b"x-huge", b"v" * 1_000_000)],
    ],
    ids=["64 KB", "10,000 keys", "1 MB"],
)
def test_too_much_metadata_is_refused(server, client, headers):
    with Connection(server.target) as connection:
        try:
            status, _ = connection.status(
                connection.call("Generate", generate().SerializeToString(), headers=headers)
            )
        except (BrokenPipeError, ConnectionResetError):  # it does not even read on
            status = "closed"
    assert status in (grpc.StatusCode.RESOURCE_EXHAUSTED.value[0], "closed", "reset")
    assert client.health() == "SERVING"


def test_metadata_that_is_no_text_harms_nobody(server):
    with Connection(server.target) as connection:
        stream = connection.call(
            "Generate", generate().SerializeToString(), headers=[(b"x-odd", b"\xff\xfe")]
        )
        assert connection.status(stream)[0] == 0


@pytest.mark.parametrize(
    "method",
    [
        "grpc.health.v1.Health/Check",
        "grpc.health.v1.Health/List",
        "grpc.health.v1.Health/Watch",
        "grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    ],
)
def test_the_standard_services_refuse_what_is_no_protobuf_too(server, method):
    with grpc.insecure_channel(server.target) as channel:
        call = channel.stream_stream(f"/{method}", request_serializer=bytes)
        with pytest.raises(grpc.RpcError) as error:
            list(call(iter([b"\x0a\xff\xff\xff"]), timeout=10))
    assert error.value.code() is INVALID
    assert error.value.details() == "the request is not valid protobuf"


def test_unknown_fields_are_ignored(call):
    unknown = struct.pack("<BBI", 0xFD, 0x7F, 7)  # field 2047, fixed32
    assert call("GenerateUnary", generate().SerializeToString() + unknown)[0] is grpc.StatusCode.OK


def test_of_two_prompts_the_last_counts(call):
    """As protobuf has it for a oneof that is set twice."""
    both = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[-1])).SerializeToString()
    assert call("GenerateUnary", both)[0] is INVALID
    assert call("GenerateUnary", both + generate().SerializeToString())[0] is grpc.StatusCode.OK


def test_an_unknown_enum_value_is_refused_by_name(call):
    data = pb.EmbedRequest(inputs=[pb.Prompt(text="a")]).SerializeToString() + b"\x20\x63"
    assert pb.EmbedRequest.FromString(data).pooling == 99
    code, details = call("Embed", data)
    assert (code, "pooling" in details and "99" in details) == (INVALID, True)


@pytest.mark.parametrize(
    ("method", "message", "words"),
    [
        ("Generate", pb.GenerateRequest(), "prompt"),
        ("Chat", pb.ChatRequest(), "messages"),
        ("Batch", pb.BatchRequest(), "items"),
        ("Embed", pb.EmbedRequest(), "inputs"),
        ("Embed", pb.EmbedRequest(inputs=[pb.Prompt()]), "inputs[0]"),
        ("Embed", pb.EmbedRequest(inputs=[pb.Prompt(text="")]), "inputs[0]"),
        ("Embed", pb.EmbedRequest(inputs=[pb.Prompt(text="a")] * 257), "257"),
        ("Score", pb.ScoreRequest(prompt=pb.Prompt(text="a")), "continuations"),
        ("Score", pb.ScoreRequest(continuations=[pb.Prompt(text="a")]), "prompt"),
        (
            "Score",
            pb.ScoreRequest(prompt=pb.Prompt(text="a"), continuations=[pb.Prompt(text="")]),
            "continuations[0]",
        ),
        (
            "Score",
            pb.ScoreRequest(
                prompt=pb.Prompt(text="a"), continuations=[pb.Prompt(text="b")], logprobs=21
            ),
            "logprobs",
        ),
        ("Tokenize", pb.TokenizeRequest(), "input"),
        (
            "Tokenize",
            pb.TokenizeRequest(
                chat=pb.Conversation(messages=[pb.ChatMessage(role="user", content="a")]),
                add_special_tokens=False,
            ),
            "add_special_tokens",
        ),
        ("Detokenize", pb.DetokenizeRequest(), "token_ids"),
        ("Detokenize", pb.DetokenizeRequest(token_ids=[-1]), "token_ids"),
        ("Abort", pb.AbortRequest(), "request_id"),
        ("WatchLoads", pb.WatchLoadsRequest(interval_ms=9), "interval_ms"),
        ("WatchLoads", pb.WatchLoadsRequest(interval_ms=2**40), "interval_ms"),
    ],
)
def test_what_is_missing_or_out_of_range_is_named(call, method, message, words):
    code, details = call(method, message)
    assert (code, words in details) == (INVALID, True), details


@pytest.mark.parametrize("method", sorted(GOOD))
def test_an_unknown_model_is_not_found(call, method):
    message = type(GOOD[method])()
    message.CopyFrom(GOOD[method])
    if "model" not in message.DESCRIPTOR.fields_by_name:
        return
    message.model = "another"
    code, details = call(method, message)
    assert (code, "another" in details and "northstar" in details) == (
        grpc.StatusCode.NOT_FOUND,
        True,
    )


@pytest.mark.parametrize("name", ["generate", "chat"])
def test_requests_of_the_first_contract_are_served(call, name):
    data = (FIXTURES / f"{name}_first.binpb").read_bytes()
    assert call(name.capitalize(), data)[0] is grpc.StatusCode.OK


@pytest.mark.parametrize("name", ["first", "second"])
def test_an_earlier_contract_still_holds(name):
    """Every message, field and RPC it had is there, with its number, type and label. The second has all RPCs."""
    files = descriptor_pb2.FileDescriptorSet.FromString(
        (FIXTURES / f"inference_{name}.binpb").read_bytes()
    )
    [old] = files.file
    new = descriptor_pb2.FileDescriptorProto()
    pb.DESCRIPTOR.CopyToProto(new)
    messages = {message.name: message for message in new.message_type}
    for message in old.message_type:
        fields = {field.name: field for field in messages[message.name].field}
        for field in message.field:
            found = fields[field.name]
            for what in ("number", "type", "label", "type_name", "proto3_optional"):
                assert getattr(found, what) == getattr(field, what), (message.name, field.name)
        kept = {
            value.name: value.number
            for enum in messages[message.name].enum_type
            for value in enum.value
        }
        for enum in message.enum_type:
            assert all(kept[value.name] == value.number for value in enum.value)
    methods = {method.name: method for method in new.service[0].method}
    for method in old.service[0].method:
        assert methods[method.name] == method


@pytest.mark.parametrize("rpc", sorted(GOOD))
def test_random_requests_get_an_answer_and_leave_nothing_behind(server, rpc):
    fuzzer = Fuzzer(server.target, rpc, seed=5)
    fuzzer.run(1.0)
    before = resident_mib(server.process.pid)
    counts = fuzzer.run(4.0)
    fuzzer.close()
    assert len(counts) > 1 or (rpc.startswith("Get") and grpc.StatusCode.OK in counts)
    assert resident_mib(server.process.pid) - before < MAX_GROWTH_MIB


def test_no_rpc_is_left_out_of_the_fuzzing():
    assert set(GOOD) == set(pb.DESCRIPTOR.services_by_name["Inference"].methods_by_name)
    assert grpc.StatusCode.INTERNAL in FORBIDDEN


def test_a_name_cannot_write_log_lines(server, call):
    """Case 17."""
    for bad in ("a\r\n{}", "\x1b[2J", 'x", "id": "y', "a" * 200):
        code, _ = call("Generate", pb.GenerateRequest(text="secret words", request_id=bad))
        assert code is INVALID
    call("Generate", pb.GenerateRequest(text="secret words", request_id="after-bad-names"))
    wait_until(lambda: any("after-bad-names" in line for line in server.errors))
    log = "".join(server.errors)
    assert "\x1b" not in log and "secret words" not in log and "\r" not in log
    requests = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert {one["id"] for one in requests} >= {"(bad)", "after-bad-names"}
