"""The real server process on the model that ships with the repository, through its port."""

import os
import signal
import socket
import threading
import time
from pathlib import Path

import grpc
import pytest

from tests.serving.server_process import CHAT, MODEL, PROMPT, Server, is_gone, serving, wait_until
from vivace import LLM, SamplingParams
from vivace.serving.client import Client


def test_a_chat_streams_the_same_reply_as_the_library(client):
    events = list(client.chat(CHAT, temperature=0))
    text = "".join(event.text for event in events)
    ids = [token for event in events for token in event.token_ids]
    want = LLM(MODEL).generate(PROMPT, SamplingParams(temperature=0))[0].outputs[0]
    assert text == want.text and ids == list(want.token_ids)
    assert len(events) > 3
    assert [event.finish_reason for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1].finish_reason == "stop"
    assert events[-1].usage.completion_tokens == len(ids)


def test_a_mixture_of_experts_chats(shared_data):
    model = shared_data / "models" / "northstar-moe"
    with serving(model=model) as server, Client(server.target) as client:
        text = "".join(event.text for event in client.chat(CHAT, temperature=0))
    want = LLM(model).generate(PROMPT, SamplingParams(temperature=0))[0].outputs[0]
    assert text == want.text != ""


def test_generate_gives_logprobs_and_prompt_logprobs(client):
    events = list(
        client.generate(PROMPT, temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=1)
    )
    assert sum(len(event.logprobs) for event in events) == 4
    assert sum(len(event.prompt_logprobs) for event in events) > 10


def test_what_adjusts_logits_reaches_the_sampler(client):
    def draw(**params):
        events = client.generate(PROMPT, max_tokens=6, ignore_eos=True, seed=1, **params)
        return [token for event in events for token in event.token_ids]

    assert draw(logit_bias={300: 100.0}) == [300] * 6
    assert set(draw(allowed_token_ids=[300, 301], bad_token_ids=[300])) == {301}
    settings = {"repetition_penalty": 1.5, "presence_penalty": 2.0, "frequency_penalty": 1.0}
    want = SamplingParams(max_tokens=6, ignore_eos=True, seed=1, **settings)
    tokens = LLM(MODEL).generate(PROMPT, want)[0].outputs[0].token_ids
    assert draw(**settings) == list(tokens)
    assert len(set(draw(allowed_token_ids=[300, 301, 302], temperature=0, **settings))) == 3


def test_a_seeded_request_gives_the_same_tokens_alone_and_among_others(client):
    def draw():
        events = client.generate(PROMPT, temperature=1.0, seed=11, max_tokens=24, ignore_eos=True)
        return [token for event in events for token in event.token_ids]

    alone = draw()

    def chat(seed):
        list(client.chat(CHAT, seed=seed))

    others = [threading.Thread(target=chat, args=(i,)) for i in range(8)]
    for thread in others:
        thread.start()
    assert draw() == alone
    for thread in others:
        thread.join()


@pytest.mark.parametrize(
    ("params", "code", "words"),
    [
        ({"temperature": float("nan")}, grpc.StatusCode.INVALID_ARGUMENT, ("temperature", "nan")),
        ({"top_p": 0.0}, grpc.StatusCode.INVALID_ARGUMENT, ("top_p", "0.0")),
        ({"top_k": -1}, grpc.StatusCode.INVALID_ARGUMENT, ("top_k", "-1")),
        ({"stop_token_ids": [4096]}, grpc.StatusCode.INVALID_ARGUMENT, ("stop_token_ids", "4096")),
        ({"temperature": 5e-324}, grpc.StatusCode.INVALID_ARGUMENT, ("temperature", "5e-324")),
        ({"n": 65}, grpc.StatusCode.INVALID_ARGUMENT, ("n", "1..64", "65")),
        (
            {"logit_bias": {5: 1e9}},
            grpc.StatusCode.INVALID_ARGUMENT,
            ("logit_bias[5]", "1000000000"),
        ),
        ({"bad_token_ids": [-1]}, grpc.StatusCode.INVALID_ARGUMENT, ("bad_token_ids", "-1")),
        ({"bad_words": ["x"]}, grpc.StatusCode.UNIMPLEMENTED, ("sampling.bad_words",)),
        ({"model": "another"}, grpc.StatusCode.NOT_FOUND, ("another",)),
    ],
)
def test_a_bad_field_is_refused_by_name_and_value(client, params, code, words):
    with pytest.raises(grpc.RpcError) as error:
        list(client.generate(PROMPT, **params))
    assert error.value.code() is code
    assert all(word in error.value.details() for word in words)


@pytest.mark.parametrize("length", [2048, 2049, 5000])
def test_a_prompt_that_fills_the_context_is_refused(client, length):
    with pytest.raises(grpc.RpcError) as error:
        list(client.generate({"prompt_token_ids": [5] * length}))
    assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(length) in error.value.details()


def test_prompt_and_max_tokens_past_the_context_end_with_length(client):
    prompt = {"prompt_token_ids": [5] * 2040}
    events = list(client.generate(prompt, max_tokens=500, ignore_eos=True))
    assert events[-1].finish_reason == "length"
    assert events[-1].usage.completion_tokens == 8


def start_200(client, way, *, timeout=None):
    """Prompts of 301 tokens: soon some decode, some are in their prompt, most are in the queue."""
    return [
        client.generate(
            {"prompt_token_ids": [5 + i, *range(100, 400)]},
            max_tokens=1500,
            ignore_eos=True,
            request_id=f"{way}-{i}",
            timeout=timeout,
        )
        for i in range(200)
    ]


def codes_of(calls):
    """How each ends, all of them read at once."""
    codes = []

    def read(call):
        try:
            list(call)
        except grpc.RpcError as error:
            codes.append(error.code())

    threads = [threading.Thread(target=read, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return codes


def check_all_is_free_within_one_step(server, client, way):
    """Once the log says that a request has ended, the engine has been told: no step may end with blocks still held."""
    wait_until(lambda: sum(f'"id": "{way}-' in line for line in server.errors) == 200, 30)
    told = client.loads()
    while (loads := client.loads()).num_blocks_used:
        assert loads.num_steps == told.num_steps
    assert loads.num_running == loads.num_waiting == 0
    assert list(client.chat(CHAT, temperature=0))[-1].finish_reason == "stop"


@pytest.mark.slow
def test_200_requests_that_hang_up_free_all_their_blocks_within_one_step(server, client):
    calls = start_200(client, "hang-up")
    for call in calls[:4]:
        next(call)
    for call in calls:
        call.close()
    check_all_is_free_within_one_step(server, client, "hang-up")


@pytest.mark.slow
def test_200_requests_past_their_deadline_free_all_their_blocks_within_one_step(server, client):
    codes = codes_of(start_200(client, "late", timeout=1.0))
    assert codes == [grpc.StatusCode.DEADLINE_EXCEEDED] * 200
    check_all_is_free_within_one_step(server, client, "late")


@pytest.mark.slow
def test_200_requests_aborted_by_id_free_all_their_blocks_within_one_step(server, client):
    calls = start_200(client, "abort")
    wait_until(lambda: client.loads().num_running + client.loads().num_waiting == 200, 30)
    assert all(client.abort(f"abort-{i}") for i in range(200))
    assert codes_of(calls) == [grpc.StatusCode.CANCELLED] * 200
    check_all_is_free_within_one_step(server, client, "abort")


def test_no_torch_is_loaded_by_the_server_or_its_engine(server):
    for pid in (server.process.pid, server.engine_pid()):
        assert "torch" not in Path(f"/proc/{pid}/maps").read_text()


def test_the_log_has_one_line_for_a_request_and_no_text_of_it(server, client):
    list(client.chat(CHAT, temperature=0, request_id="logged-1"))
    wait_until(lambda: any("logged-1" in line for line in server.errors))
    [line] = [line for line in server.errors if "logged-1" in line]
    assert "delivery" not in line.lower() and "stop" in line


def test_a_killed_engine_ends_every_stream_and_the_server():
    with serving() as server, Client(server.target) as client:
        call = client.generate(PROMPT, max_tokens=1500, ignore_eos=True)
        next(call)
        os.kill(server.engine_pid(), signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(grpc.RpcError) as error:
            list(call)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert time.monotonic() - start < 1.0
        code, errors = server.wait(5)
        assert code != 0
        assert "Traceback" not in errors and "engine" in errors


def test_a_dead_front_end_takes_the_engine_with_it():
    with serving() as server, Client(server.target) as client:
        next(client.generate(PROMPT, max_tokens=1500, ignore_eos=True))
        engine = server.engine_pid()
        server.process.kill()
        assert is_gone(engine, 2.0)


def test_two_servers_on_one_machine_do_not_meet():
    with serving() as one, serving() as two:
        assert one.target != two.target and one.engine_pid() != two.engine_pid()
        with Client(one.target) as first, Client(two.target) as second:
            list(first.chat(CHAT, temperature=0))
            assert first.loads().num_requests_finished == 1
            assert second.loads().num_requests_finished == 0


def test_sigterm_drains():
    with serving() as server, Client(server.target) as client:
        call = client.generate(PROMPT, max_tokens=300, ignore_eos=True, temperature=0)
        next(call)
        os.kill(server.engine_pid(), signal.SIGTERM)  # a service manager tells the whole group
        server.process.terminate()
        wait_until(lambda: client.health() != "SERVING")
        with pytest.raises(grpc.RpcError) as error:
            list(client.generate(PROMPT))
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert list(call)[-1].finish_reason == "length"
        assert server.wait(10)[0] == 0


def test_a_second_sigterm_aborts():
    with serving() as server, Client(server.target) as client:
        call = client.generate(PROMPT, max_tokens=1900, ignore_eos=True, temperature=0)
        next(call)
        server.process.terminate()
        wait_until(lambda: client.health() != "SERVING")
        server.process.terminate()
        with pytest.raises(grpc.RpcError) as error:
            list(call)
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert server.wait(5)[0] == 1


def refused(*arguments, model=MODEL):
    """What a server that does not start says."""
    server = Server(*arguments, model=model)
    try:
        code, errors = server.wait(20)
    finally:
        server.stop()
    assert code != 0
    assert "Traceback" not in errors
    [line] = [line for line in errors.splitlines() if "error" in line]
    return line


def test_a_port_in_use_is_one_clear_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert str(port) in refused("--port", str(port))


def test_an_address_off_loopback_needs_insecure():
    assert "--insecure" in refused("--port", "0", "--host", "0.0.0.0")


def test_too_little_memory_is_one_clear_line():
    assert "not enough memory" in refused("--port", "0", "--kv-memory", "100000GiB")


def test_a_truncated_checkpoint_is_one_clear_line(tmp_path):
    for file in MODEL.iterdir():
        if file.is_file():
            data = file.read_bytes()
            (tmp_path / file.name).write_bytes(
                data[:-1000] if file.suffix == ".safetensors" else data
            )
    assert "model.safetensors" in refused("--port", "0", model=tmp_path)


def test_a_model_that_is_not_there_is_one_clear_line(tmp_path):
    assert "nowhere" in refused("--port", "0", model=tmp_path / "nowhere")
