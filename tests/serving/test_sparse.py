"""Sparse decode through the port: what is asked, what is refused, and what is told of it."""

import asyncio

import grpc
import pytest

from tests.serving.server_process import serving
from tests.tiny_models import make_checkpoint
from vivace.serving.client import AsyncClient, Client, InvalidArgument
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb
from vivace.serving.protos.vivace.v1 import inference_pb2_grpc as pb_grpc

PROMPT = [5 + i % 900 for i in range(400)]
PARAMS = {"temperature": 0, "max_tokens": 20, "ignore_eos": True}
RULES = {"budget_tokens": 128, "min_context": 0, "layers_dense": [0]}


@pytest.fixture(scope="module")
def dense(server):
    with Client(server.target) as client:
        [reply] = client.complete(PROMPT, **PARAMS).replies
    assert (reply.usage.sparse_tokens, reply.usage.kept_mass) == (0, None)
    assert (reply.usage.num_measured, reply.usage.returned_to_dense) == (0, False)
    return reply


def is_sparse(usage, count=19):
    assert 0 < usage.kept_mass <= 1 and usage.num_measured >= 1
    return usage.sparse_tokens == count


def test_a_request_that_asks_for_it_decodes_sparsely_and_is_told(client, dense):
    before = client.loads()
    [reply] = client.complete(PROMPT, **PARAMS, sparse=RULES).replies
    assert is_sparse(reply.usage) and reply.token_ids[0] == dense.token_ids[0]
    after = client.loads()
    assert after.num_sparse_tokens - before.num_sparse_tokens == 19
    assert after.num_measured_rows - before.num_measured_rows == reply.usage.num_measured
    kept = (after.kept_mass_sum - before.kept_mass_sum) / reply.usage.num_measured
    assert kept == pytest.approx(reply.usage.kept_mass, abs=1e-9)
    assert after.num_returned_to_dense == before.num_returned_to_dense
    *_, last = client.generate(PROMPT, **PARAMS, sparse=RULES)
    assert last.usage.sparse_tokens == 19


def test_every_way_to_generate_takes_it(client, server):
    messages = [{"role": "user", "content": "Where is my order? " * 60}]
    assert is_sparse(client.complete_chat(messages, **PARAMS, sparse=RULES).replies[0].usage)
    *_, last = client.chat(messages, **PARAMS, sparse=RULES)
    assert is_sparse(last.usage)
    items = [{"prompt": PROMPT, "sparse": RULES}, PROMPT]
    one, other = (outcome.replies[0].usage for outcome in client.batch(items, **PARAMS))
    assert is_sparse(one) and other.sparse_tokens == 0

    async def ask():
        async with AsyncClient(server.target) as other:
            return await other.complete(PROMPT, **PARAMS, n=2, sparse=pb.Sparse(**RULES))

    assert all(is_sparse(reply.usage) for reply in asyncio.run(ask()).replies)


@pytest.mark.parametrize(
    "rules",
    [
        {},  # 2048 tokens, the server's least context
        {"budget_tokens": 128},
        RULES | {"budget_tokens": 0},
        RULES | {"budget_tokens": 432},
        RULES | {"min_context": 420},
        {"budget_tokens": 128, "min_context_tokens": 420, "layers_dense": [0]},  # its earlier name
        RULES | {"layers_dense": list(range(8))},
    ],
)
def test_who_is_never_sparse_gets_dense_tokens(client, dense, rules):
    [reply] = client.complete(PROMPT, **PARAMS, sparse=rules).replies
    assert reply.token_ids == dense.token_ids and reply.usage.sparse_tokens == 0


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (
            {"budget_tokens": 127},
            "sparse.budget_tokens, if not 0, must be .* at least 128, got 127",
        ),
        ({"budget_tokens": -1}, "sparse.budget_tokens.* got -1"),
        ({"min_context": -1}, "sparse.min_context must be .* at least 0, got -1"),
        ({"budget_tokens": 0, "min_context": -5}, "sparse.min_context"),
        ({"min_context": 1, "min_context_tokens": 1}, "sparse.min_context_tokens must not be set"),
        ({"layers_dense": [1]}, r"sparse.layers_dense must be .* up to 7 at most, got \[1\]"),
        ({"layers_dense": [1, 0]}, "sparse.layers_dense"),
        ({"layers_dense": [0, 0]}, "sparse.layers_dense"),
        ({"layers_dense": [-1]}, "sparse.layers_dense"),
        ({"layers_dense": list(range(9))}, "sparse.layers_dense"),
    ],
)
def test_a_bad_field_is_refused_by_name(client, rules, words):
    for call in (client.complete, client.generate):
        with pytest.raises(InvalidArgument, match=words):
            list(call(PROMPT, **PARAMS, sparse=rules))


def test_an_unknown_field_is_a_type_error(client):
    with pytest.raises(TypeError, match=r"sparse: .*budget"):
        client.complete(PROMPT, sparse={"budget": 1})


def test_what_decodes_nothing_does_not_take_it(server):
    options = pb.RequestOptions(sparse=pb.Sparse())
    prompt = pb.Prompt(text="a")
    with grpc.insecure_channel(server.target) as channel:
        stub = pb_grpc.InferenceStub(channel)
        for call, request in (
            (stub.Embed, pb.EmbedRequest(inputs=[prompt], options=options)),
            (stub.Score, pb.ScoreRequest(prompt=prompt, continuations=[prompt], options=options)),
        ):
            with pytest.raises(grpc.RpcError) as error:
                call(request)
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert "options.sparse" in error.value.details()


def test_the_servers_default_is_for_those_who_do_not_say(dense):
    words = ("budget_tokens=128", "min_context=0", "layers_dense=0", "min_kept_mass=0.999")
    settings = [word for one in words for word in ("--set", f"sparse.{one}")]
    with serving(*settings) as server, Client(server.target) as client:

        def usage(**params):
            return client.complete(PROMPT, **PARAMS, **params).replies[0].usage

        first = usage()  # the guard's bound is not met
        assert first.returned_to_dense and first.sparse_tokens == first.num_measured == 1
        assert client.loads().num_returned_to_dense == 1
        assert usage(sparse={}).sparse_tokens == 1
        assert usage(sparse={"min_context": 410}).sparse_tokens == 1
        assert usage(sparse={"min_context": 420}).sparse_tokens == 0
        off = client.complete(PROMPT, **PARAMS, sparse={"budget_tokens": 0}).replies[0]
        assert off.usage.sparse_tokens == 0 and off.token_ids == dense.token_ids


def test_a_model_of_windows_alone_says_why_it_refuses(tmp_path):
    model = make_checkpoint(tmp_path / "mistral", "mistral", sliding_window=32)
    words = ("--set", "sparse.budget_tokens=128", "--set", "sparse.min_context=0")
    with serving(*words, model=model) as server, Client(server.target) as client:
        params = {"max_tokens": 4, "ignore_eos": True}
        assert client.complete(PROMPT[:200], **params).replies[0].usage.sparse_tokens == 0
        with pytest.raises(InvalidArgument, match=r"sparse must not be set .* window"):
            client.complete(PROMPT[:200], **params, sparse={})
