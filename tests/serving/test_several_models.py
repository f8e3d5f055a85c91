"""Two models on one port: who answers, and what one's failure means for the other."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap

import grpc
import pytest

from tests.serving.server_process import MODEL, Server, engine_pids, is_gone, serving
from tests.tiny_models import VOCAB_SIZE, make_checkpoint
from vivace import LLM, SamplingParams
from vivace.engine.plan import read_machine
from vivace.serving.client import Client
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb
from vivace.serving.protos.vivace.v1 import inference_pb2_grpc as pb_grpc

IDS = {"prompt_token_ids": [5, 6, 7]}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("tiny"))


def words(tiny):
    return "--name", "north", str(tiny), "--name", "tiny", "--kv-memory", "16MiB"


@pytest.fixture(scope="module")
def two(tiny):
    with serving(*words(tiny), names="north, tiny") as server:
        yield server


@pytest.fixture
def stub(two):
    with grpc.insecure_channel(two.target) as channel:
        yield pb_grpc.InferenceStub(channel)


def test_the_named_model_answers(two, tiny):
    params = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
    with Client(two.target) as client:
        for name, folder in (("north", MODEL), ("tiny", tiny)):
            events = client.generate(IDS, model=name, **params)
            got = [token for event in events for token in event.token_ids]
            want = LLM(folder).generate(IDS, SamplingParams(**params))[0].outputs[0].token_ids
            assert got == list(want), name
        assert client.health() == "SERVING"


def test_a_name_must_be_given_and_one_that_is_served(stub):
    for unset in (pb.GenerateRequest(text="x"), pb.GenerateRequest(text="x", model="other")):
        with pytest.raises(grpc.RpcError) as error:
            list(stub.Generate(unset))
        if unset.HasField("model"):
            assert error.value.code() is grpc.StatusCode.NOT_FOUND
            assert "'other' is not served here; 'north' and 'tiny' is" in error.value.details()
        else:
            assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert error.value.details() == "model must be set: 'north' and 'tiny' are served"


def test_each_model_tells_of_itself_and_takes_its_part_of_the_cpus(stub):
    assert stub.GetModelInfo(pb.GetModelInfoRequest(model="tiny")).vocab_size == VOCAB_SIZE
    assert stub.GetModelInfo(pb.GetModelInfoRequest(model="north")).vocab_size == 4096
    for name in ("north", "tiny"):
        info = stub.GetServerInfo(pb.GetServerInfoRequest(model=name))
        assert info.threads == max(1, read_machine().num_cpus // 2)
        assert 15 << 20 < info.kv_bytes <= 16 << 20


def test_the_commands_can_name_a_model(two):
    def run(*words):
        words = (sys.executable, "-m", "vivace", *words, "--target", two.target)
        return subprocess.run(words, capture_output=True, text=True, input="Hi\n", check=False)

    for words in (("generate", "x", "--max-tokens", "1"), ("chat", "--max-tokens", "1")):
        assert run(*words, "--name", "tiny").returncode == 0
        refused = run(*words)
        assert refused.returncode == 1 and "model must be set" in refused.stderr


def test_abort_finds_a_request_of_either_model(two):
    with Client(two.target) as client:
        call = client.generate(
            IDS, model="north", request_id="one", max_tokens=1900, ignore_eos=True
        )
        next(call)
        assert client.abort("one") and not client.abort("none")
        with pytest.raises(grpc.RpcError) as error:
            list(call)
        assert error.value.code() is grpc.StatusCode.CANCELLED


def test_a_dead_engine_ends_the_streams_of_both_and_the_server_names_its_model(tiny):
    with serving(*words(tiny), names="north, tiny") as server, Client(server.target) as client:
        params = {"max_tokens": 1900, "ignore_eos": True}
        call = client.generate(IDS, model="north", **params)
        next(call)
        first, second = sorted(engine_pids(server.process.pid))
        os.kill(second, signal.SIGKILL)  # not the one that generates
        with pytest.raises(grpc.RpcError) as error:
            list(call)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        code, errors = server.wait(10)
        assert code == 1 and is_gone(first, 2)
        last = errors.splitlines()[-1]
        assert last == "vivace: error: model 'tiny': the engine process was killed by SIGKILL"


def test_a_model_that_cannot_load_is_named_and_ends_the_server(tiny, tmp_path):
    bad = make_checkpoint(tmp_path / "bad")
    (bad / "model.safetensors").write_bytes(b"nothing")
    server = Server("--port", "0", str(bad), "--name", "good", "--name", "bad", model=tiny)
    try:
        code, errors = server.wait(30)
        assert code == 1 and "Traceback" not in errors
        assert errors.splitlines()[-1].startswith("vivace: error: model 'bad': ")
    finally:
        server.stop()


@pytest.mark.parametrize(
    ("more", "text"),
    [
        (("--name", "a", "--name", "a"), "models must have different names, got 'a'"),
        (("--name", "a"), "--name must be given once for each MODEL or not at all, got 1 for 2"),
        ((), "models must have different names, got 'northstar'"),
        (("--name", "a", "--name", "b", "--kv-memory", "900GiB"), "not enough memory"),
    ],
)
def test_what_cannot_be_served_together_is_refused(more, text):
    server = Server("--port", "0", str(MODEL), *more)
    try:
        code, errors = server.wait(30)
        assert code == 1 and text in errors.splitlines()[-1] and errors.count("\n") == 1
    finally:
        server.stop()


PROGRESS = """
    import sys
    from pathlib import Path
    from vivace.engine.config import Config, ServerConfig
    from vivace.engine.runtimes.native import spawn
    from vivace.serving.server import run

    launches = {name: (Config(model=Path(sys.argv[1])), spawn()) for name in ("a", "b")}
    run(ServerConfig(port=0), launches, lambda done, total: print(done, total, flush=True))
"""


def test_the_progress_is_that_of_all_models_together(tiny):
    words = [sys.executable, "-c", textwrap.dedent(PROGRESS), str(tiny)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        lines = iter(process.stdout.readline, b"")
        shown = [tuple(map(int, line.split())) for line in until_ready(lines)]
        process.terminate()
        assert process.wait(10) == 0
    alone = (tiny / "model.safetensors").stat().st_size
    assert {round(total / alone) for _, total in shown} == {2}
    assert shown == sorted(shown) and shown[-1][0] == shown[-1][1]


def until_ready(lines):
    return itertools.takewhile(lambda line: not line.startswith(b"vivace: serving"), lines)


ONE_LOADS_FOR_EVER = """
    import sys
    from pathlib import Path
    from vivace.engine.config import Config, ServerConfig
    from vivace.engine.errors import EngineDied
    from vivace.engine.runtimes.native import spawn
    from vivace.serving.server import run

    slow = spawn((sys.executable, "-c", "import time; time.sleep(60)"))
    launches = {"slow": (Config(model=Path(sys.argv[1])), slow)}
    launches["quick"] = (Config(model=Path(sys.argv[1])), spawn())
    try:
        run(ServerConfig(port=0), launches, print)
    except EngineDied as error:
        sys.exit(str(error))
"""


def test_an_engine_that_dies_while_another_loads_ends_the_server(tiny):
    words = [sys.executable, "-c", textwrap.dedent(ONE_LOADS_FOR_EVER), str(tiny)]
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr.readline().startswith("vivace: quick: LlamaForCausalLM, ")
        [engine] = engine_pids(process.pid)
        os.kill(engine, signal.SIGKILL)
        assert process.wait(10) == 1
        text = process.stderr.read()
        assert text == "model 'quick': the engine process was killed by SIGKILL\n"
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
