"""Clients of every kind on the real server: Vivace's own, and those that nobody here wrote. All are told the same."""

import asyncio
import json
import math
import shutil
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from google.protobuf import message_factory
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import (
    ProtoReflectionDescriptorDatabase,
)
from grpc_tools import protoc

from tests.serving.server_process import CHAT, PROMPT
from vivace.serving.client import AsyncClient, InvalidArgument
from vivace.serving.protos import generate

CLIENTS = Path(__file__).parent / "clients"
PROTOS = Path(generate.__file__).parent
NODE = Path(__file__).parents[2] / "build" / "node"
QUESTION = CHAT[0]["content"]
INSTALL_S = 60


@pytest.fixture(scope="module")
def reply(server):
    """What all are told."""

    async def run():
        async with AsyncClient(server.target) as client:
            return [event async for event in client.chat(CHAT, temperature=0)]

    return "".join(event.text for event in asyncio.run(run()))


def test_every_way_of_asking_gives_the_same_reply(client, reply):
    assert "".join(event.text for event in client.chat(CHAT, temperature=0)) == reply != ""
    assert client.complete_chat(CHAT, temperature=0).text == reply
    assert client.complete(PROMPT, temperature=0).replies[0].finish_reason == "stop"
    items = [PROMPT, {"messages": CHAT}, {"prompt": PROMPT, "temperature": 9}]
    plain, chat, bad = client.batch(items, temperature=0)
    assert plain.text == chat.text == reply
    assert isinstance(bad, InvalidArgument) and "temperature" in bad.details()
    parts = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    assert client.complete_chat(parts, temperature=0).text == reply


def test_tokens_go_there_and_back(client):
    tokens = client.tokenize(CHAT, return_tokens=True)
    assert tokens.token_ids == client.tokenize(PROMPT).token_ids
    assert len(tokens.tokens) == len(tokens.token_ids)
    assert client.detokenize(tokens.token_ids, skip_special_tokens=False) == PROMPT


def test_scores_and_embeddings_are_what_they_should_be(client):
    scores = client.score("Delivery takes", [" three days", " banana"], logprobs=1).scores
    for score in scores:
        assert score.sum_logprob == pytest.approx(sum(p.logprob for p in score.logprobs))
        assert score.mean_logprob == pytest.approx(score.sum_logprob / len(score.token_ids))
    for embedding in client.embed(["Delivery", [5, 6, 7]], pooling="last"):
        assert math.hypot(*embedding.values) == pytest.approx(1, abs=1e-4)


def test_loads_can_be_watched(client):
    with closing(client.watch_loads(interval_ms=10)) as loads:
        before, after = next(loads), next(loads)
    assert after.num_steps >= before.num_steps > 0 and after.num_blocks > 0


def test_reflection_alone_is_enough_to_ask(server, reply):
    """As grpcurl does: no generated code, no proto file."""
    with grpc.insecure_channel(server.target) as channel:
        database = ProtoReflectionDescriptorDatabase(channel)
        [name] = [name for name in database.get_services() if name.endswith(".Inference")]
        service = DescriptorPool(database).FindServiceByName(name)

        def call(rpc, **fields):
            method = service.methods_by_name[rpc]
            request, response = map(
                message_factory.GetMessageClass, (method.input_type, method.output_type)
            )
            make = channel.unary_stream if method.server_streaming else channel.unary_unary
            return make(
                f"/{name}/{rpc}",
                request_serializer=request.SerializeToString,
                response_deserializer=response.FromString,
            )(request(**fields))

        assert call("GetModelInfo").name == "northstar"
        responses = list(call("Chat", messages=CHAT, sampling={"temperature": 0}))
    assert "".join(response.text for response in responses) == reply
    assert responses[-1].finish.reason == 1 and len(responses) > 3


def test_plain_protoc_is_enough_to_ask(server, reply, tmp_path):
    """In a process that has the generated code, grpcio and protobuf."""
    words = [f"-I{PROTOS}", f"--python_out={tmp_path}", f"--grpc_python_out={tmp_path}"]
    assert protoc.main(["protoc", *words, "vivace/v1/inference.proto"]) == 0
    packages = str(Path(grpc.__file__).parents[1])
    script = str(CLIENTS / "plain_stub.py")
    done = run(
        [sys.executable, "-I", "-S", script, str(tmp_path), server.target, QUESTION, packages]
    )
    assert "".join(done["texts"]) == reply and done["reason"] == 1
    assert done["vivace"] == [str(tmp_path / "vivace")] and not done["has_client"]


def test_node_streams_a_chat(server, reply):
    node = shutil.which("node")
    if node is None:
        pytest.skip("node is not installed")
    install()
    script = str(shutil.copy(CLIENTS / "chat.js", NODE))  # it finds packages beside itself
    done = run([node, script, str(PROTOS), server.target, QUESTION])
    assert "".join(done["texts"]) == reply and len(done["texts"]) > 3
    assert done["reason"] == "REASON_STOP"


def run(words):
    """What a client prints."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def install():
    """Have the Node.js packages of the lock file in build/node, or skip the test."""
    lock = (CLIENTS / "package-lock.json").read_text()
    stamp = NODE / "installed.json"
    if stamp.is_file() and stamp.read_text() == lock:
        return
    npm = shutil.which("npm")
    if npm is None:
        pytest.skip("npm is not installed")
    NODE.mkdir(parents=True, exist_ok=True)
    for name in ("package.json", "package-lock.json"):
        shutil.copy(CLIENTS / name, NODE)
    words = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0"]
    try:
        done = subprocess.run(
            words, cwd=NODE, capture_output=True, text=True, timeout=INSTALL_S, check=False
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm did not get the packages within {INSTALL_S} s")
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("npm error")]
        pytest.skip(f"npm cannot get the packages: {'; '.join(errors[:3])}")
    stamp.write_text(lock)
