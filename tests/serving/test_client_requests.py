"""What the Python clients send and give back: parameters, messages, results, batches. The service is a fake."""

import asyncio
import threading
from contextlib import aclosing, closing

import grpc
import pytest

from tests.serving import fake_server
from vivace.serving import client as library
from vivace.serving import convert
from vivace.serving.client import (
    AsyncClient,
    Cancelled,
    Client,
    Completion,
    DeadlineExceeded,
    InvalidArgument,
    Overloaded,
    Unavailable,
    batch,
)
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb

HELLO = [{"role": "user", "content": "Hello"}]
MISSING_KEYS = [  # of messages as OpenAI has them, and the key that the error names
    ({"role": "user", "content": [{"type": "text"}]}, "content part must have 'text'"),
    ({"role": "user", "content": [{"type": "image_url"}]}, "content part must have 'image_url'"),
    (
        {"role": "user", "content": [{"type": "image_url", "image_url": {}}]},
        "image_url must have 'url'",
    ),
    ({"role": "assistant", "tool_calls": [{"function": {}}]}, "function must have 'name'"),
    (
        {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]},
        "function must have 'arguments'",
    ),
]
NO_OBJECTS = [
    ({"role": "user", "content": ["hi"]}, "content part must be an object, got 'hi'"),
    ({"role": "user", "content": [None]}, "content part must be an object, got None"),
    ({"role": "user", "content": 5}, "not iterable"),
    ({"role": "assistant", "tool_calls": ["f"]}, "tool call must be an object, got 'f'"),
    (
        {"role": "assistant", "tool_calls": [{"function": "f"}]},
        "function must be an object, got 'f'",
    ),
]


@pytest.fixture
def client(fake):
    with Client(fake.target) as client:
        yield client


def test_events_and_completions_have_all_that_came(client):
    first, last = client.generate("x")
    assert (first.request_id, first.index, first.text, first.token_ids) == ("r", 1, "a", (5,))
    assert (first.finish_reason, first.stop_reason, first.usage) == (None, None, None)
    assert (last.finish_reason, last.stop_reason, last.usage.completion_tokens) == ("stop", 9, 2)
    whole = client.complete("x", n=2)
    assert (whole.request_id, whole.text, len(whole.replies)) == ("r", "x!", 2)
    reply = whole.replies[1]
    assert (reply.index, reply.text, reply.token_ids) == (1, "x!", (5, 9))
    assert (reply.finish_reason, reply.stop_reason) == ("stop", 9)
    assert reply.usage.completion_tokens == 2 and reply.logprobs[0].logprob == -0.5
    assert [place.token_id for place in whole.prompt_logprobs] == [None, 5]
    assert client.complete_chat(HELLO).text == "chat!"


def test_a_reason_that_only_a_newer_server_knows_is_its_number(fake, client, monkeypatch):
    monkeypatch.setattr(fake_server, "FINISH", pb.Finish(reason=99, usage=pb.Usage()))
    assert [event.finish_reason for event in client.generate("x")] == [None, "99"]
    assert client.complete("x").replies[0].finish_reason == "99"
    monkeypatch.setattr(fake_server, "FINISH", pb.Finish(usage=pb.Usage()))
    assert client.complete("x").replies[0].finish_reason == "unspecified"


def test_parameters_stand_where_the_proto_has_them(fake, client):
    client.complete(
        [1, 2],
        request_id="r",
        temperature=0,
        stop="end",
        logit_bias={5: 1.5},
        logprobs=2,
        cache_salt="s",
        priority=None,
        seed=3,
    )
    assert fake.requests[-1] == pb.GenerateRequest(
        request_id="r",
        token_ids=pb.TokenIds(ids=[1, 2]),
        sampling=pb.SamplingParams(temperature=0, stop=["end"], logit_bias={5: 1.5}, seed=3),
        response=pb.ResponseOptions(logprobs=2),
        options=pb.RequestOptions(cache_salt="s"),
    )
    client.complete({"prompt_token_ids": []})
    assert fake.requests[-1].WhichOneof("prompt") == "token_ids"


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"temprature": 1}, "unknown parameter 'temprature'"),
        ({"temperature": "hot"}, "temperature: .*'hot'"),
        ({"max_tokens": 2**70}, f"max_tokens: .*{2**70}"),
        ({"stop": [1]}, r"stop: .*\[1\]"),
    ],
)
def test_a_parameter_of_no_use_is_a_type_error_naming_it(fake, client, params, words):
    for call in (client.generate, client.complete):
        with pytest.raises(TypeError, match=words):
            call("x", **params)
    with pytest.raises(TypeError, match=words):
        client.batch(["x"], **params)
    assert fake.requests == []


def test_every_parameter_that_is_served_has_a_type():
    served = {name for part in ("SamplingParams", "ResponseOptions", "RequestOptions", "ChatRequest")
              for name in convert.SERVED[part]}  # fmt: skip
    typed = set(library.Params.__annotations__)
    assert served - typed == {"sampling", "response", "options", "messages"}
    for name, request, rest in (
        ("EmbedParams", pb.EmbedRequest, {"inputs", "options"}),
        ("ScoreParams", pb.ScoreRequest, {"prompt", "continuations", "options"}),
    ):
        fields = set(request.DESCRIPTOR.fields_by_name)
        typed = set(getattr(library, name).__annotations__)
        assert (fields - rest) | {"cache_salt", "priority"} == typed


def test_messages_may_be_written_as_openai_has_them(fake, client):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    image = {"type": "image_url", "image_url": {"url": "http://x"}}
    client.complete_chat(
        [
            ("system", "Be kind."),
            {"role": "user", "content": [{"type": "text", "text": "Look:"}, image]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "3", "tool_call_id": "c", "name": "f"},
        ],
        template_variables={"a": "1"},
    )
    assert fake.requests[-1] == pb.ChatRequest(
        messages=[
            pb.ChatMessage(role="system", content="Be kind."),
            pb.ChatMessage(
                role="user",
                content_parts=[pb.ContentPart(text="Look:"), pb.ContentPart(image_url="http://x")],
            ),
            pb.ChatMessage(
                role="assistant", tool_calls=[pb.ToolCall(id="c", name="f", arguments_json="{}")]
            ),
            pb.ChatMessage(role="tool", content="3", tool_call_id="c", name="f"),
        ],
        template_variables={"a": "1"},
    )


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"rôle": "user"}, "rôle"),
        ({"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}, "input_audio"),
        ({"role": "user", "content": [{"text": "x"}]}, "must have 'type'"),
        *MISSING_KEYS,
        (("user", "a", "b"), "longer"),
    ],
)
def test_a_message_of_no_use_is_a_value_error_naming_what(client, message, words):
    with pytest.raises(ValueError, match=words):
        client.chat([message])


@pytest.mark.parametrize(("message", "words"), NO_OBJECTS)
def test_a_message_whose_parts_are_no_objects_is_a_type_error(client, message, words):
    with pytest.raises(TypeError, match=words):
        client.chat([message])


def test_the_other_calls_say_what_they_are_told(fake, client):
    embedding, _ = client.embed(["a", [1]], pooling="last", normalize=False, priority=2)
    assert (embedding.values, embedding.prompt_tokens) == ((0.5, 0.25), 3)
    assert fake.requests[-1] == pb.EmbedRequest(
        inputs=[pb.Prompt(text="a"), pb.Prompt(token_ids=pb.TokenIds(ids=[1]))],
        pooling=pb.EmbedRequest.POOLING_LAST,
        normalize=False,
        options=pb.RequestOptions(priority=2),
    )
    assert len(client.embed("one text")) == 1
    scores = client.score("a", ["b", [2]], logprobs=1)
    assert (scores.prompt_tokens, len(scores.scores)) == (4, 2)
    assert (scores.scores[0].sum_logprob, scores.scores[0].mean_logprob) == (-1, -0.5)
    assert scores.scores[1].logprobs == scores.prompt_logprobs
    assert fake.requests[-1].continuations[1].token_ids.ids == [2]
    tokens = client.tokenize("ab", return_tokens=True)
    assert (tokens.token_ids, tokens.tokens, tokens.max_context_tokens) == ((1, 2), ("a", "b"), 64)
    client.tokenize(HELLO, add_generation_prompt=False)
    chat = pb.Conversation(
        messages=[pb.ChatMessage(role="user", content="Hello")], add_generation_prompt=False
    )
    assert fake.requests[-1] == pb.TokenizeRequest(chat=chat)
    with pytest.raises(TypeError, match="add_generation_prompt"):
        client.tokenize("a text", add_generation_prompt=False)
    with pytest.raises(TypeError, match="pooling"):
        client.embed("a", pooling="max")
    assert client.detokenize([1, 2], skip_special_tokens=False) == "ab"
    assert fake.requests[-1] == pb.DetokenizeRequest(token_ids=[1, 2], skip_special_tokens=False)


def test_loads_are_watched_until_the_iterator_is_closed(fake, client):
    with closing(client.watch_loads(interval_ms=20)) as loads:
        assert [next(loads).num_running for _ in range(3)] == [7] * 3
    assert fake.ended.acquire(timeout=5)
    assert fake.requests == [pb.WatchLoadsRequest(interval_ms=20)]


def test_a_batch_gives_outcomes_in_order_and_errors_as_values(fake, client):
    items = [
        "one",
        "bad",
        {"prompt": "three", "max_tokens": 3},
        {"messages": HELLO, "seed": 1},
        [7, 8],
        {"prompt_token_ids": [9]},
        "silent",
    ]
    seen = []
    outcomes = client.batch(items, max_tokens=9, progress=lambda *counts: seen.append(counts))
    assert [one.text for one in outcomes if isinstance(one, Completion)] == [
        "one!", "three!", "chat!", "!", "!",
    ]  # fmt: skip
    assert isinstance(outcomes[1], InvalidArgument) and "temperature" in outcomes[1].details()
    assert outcomes[6].code() is grpc.StatusCode.INTERNAL
    assert seen == [(i, 7) for i in range(1, 8)]
    [request] = fake.requests
    sent = [item.generate if item.HasField("generate") else item.chat for item in request.items]
    assert [one.sampling.max_tokens for one in sent] == [9, 9, 3, 9, 9, 9, 9]
    assert sent[3].sampling.seed == 1 and sent[5].token_ids.ids == [9]


def test_a_batch_is_split_into_calls_that_the_server_takes(fake, client):
    outcomes = client.batch([str(i) for i in range(2500)])
    assert [one.text for one in outcomes] == [f"{i}!" for i in range(2500)]
    assert sorted(len(request.items) for request in fake.requests) == [452, 1024, 1024]
    fake.requests.clear()
    outcomes = client.batch([f"{i}" + "x" * (1 << 20) for i in range(5)] + ["x" * (5 << 20), "end"])
    assert [one.text[0] for one in outcomes if isinstance(one, Completion)] == [*"01234e"]
    assert isinstance(outcomes[5], Overloaded)
    assert sorted(len(request.items) for request in fake.requests) == [1, 1, 2, 2]
    assert all(request.ByteSize() <= 3 << 20 for request in fake.requests)
    assert client.batch([]) == []


def test_some_calls_of_a_batch_run_at_once_and_no_more_than_allowed(fake, monkeypatch):
    monkeypatch.setattr(batch, "MAX_ITEMS", 2)
    fake.batch_gate = threading.Barrier(3)
    prompts = ["x"] * 12

    async def run():
        async with AsyncClient(fake.target) as client:
            return await client.batch(prompts, max_parallel=3)

    with Client(fake.target) as client:
        assert len(client.batch(prompts, max_parallel=3)) == len(asyncio.run(run())) == 12
    assert fake.most_batches == 3
    with Client(fake.target) as client, pytest.raises(ValueError, match="max_parallel"):
        client.batch(["x"], max_parallel=0)


def test_what_a_broken_call_has_answered_is_not_lost(fake, client):
    outcomes = client.batch(["breaks", "two", "three"])
    assert [type(one) for one in outcomes] == [Unavailable, Completion, Completion]
    fake.refusals = [(grpc.StatusCode.RESOURCE_EXHAUSTED, 1)]
    assert client.batch(["x"])[0].text == "x!"


def test_a_batch_that_is_given_up_is_cancelled(fake, client):
    with closing(client.batch_iter(["endless", "two"])) as answers:
        index, outcome = next(answers)
        assert (index, outcome.text) == (1, "two!")
    assert fake.ended.acquire(timeout=5)
    with pytest.raises(ZeroDivisionError) as error:  # which holds all that was on the stack
        client.batch(["endless", "two"], progress=lambda done, total: 1 // 0)
    assert fake.ended.acquire(timeout=5), error


def test_a_batch_that_the_collector_ends_while_a_call_begins_ends():
    """It may run in the very thread that begins one."""

    class Call:
        def cancel(self):
            cancelled.append(self)

    def start(request):
        assert has_begun.wait(10)
        found[0].cancel()
        found[0].join()
        return Call()

    found, cancelled, has_begun = [], [], threading.Event()
    calls = batch.split([pb.BatchItem(generate=pb.GenerateRequest(text="x"))])
    found.append(batch._Readers(calls, start, 1))
    has_begun.set()
    index, outcome = found[0].answers.get(timeout=10)
    assert (index, type(outcome), len(cancelled)) == (0, Cancelled, 1)


def test_the_time_of_a_batch_is_that_of_all_its_calls(fake, client):
    outcomes = client.batch(["endless"] * 1025, timeout=0.5, max_parallel=1)
    assert {type(one) for one in outcomes} == {DeadlineExceeded}
    assert 0 < fake.left[0] < 0.6 and all(left < 0.1 for left in fake.left[1:])


def test_the_asyncio_client_does_all_that_the_other_does(fake):
    async def test(client):
        assert (await client.complete_chat(HELLO)).text == "chat!"
        assert [event.text async for event in client.chat(HELLO)] == ["a", "b"]
        outcomes = await client.batch(["one", "bad", "breaks", "four"])
        kinds = [type(one) for one in outcomes]
        assert kinds == [Unavailable, Unavailable, Unavailable, Completion]
        async with aclosing(client.batch_iter(["endless", "two"])) as answers:
            index, outcome = await anext(answers)
            assert (index, outcome.text) == (1, "two!")
        assert len(await client.embed(["a"])) == 1
        assert (await client.score("a", ["b"])).prompt_tokens == 4
        assert (await client.tokenize("a")).token_ids == (1, 2)
        assert await client.detokenize([1]) == "ab"
        async with aclosing(client.watch_loads()) as loads:
            assert (await anext(loads)).num_running == 7

    async def run():
        async with AsyncClient(fake.target) as client:
            await test(client)

    asyncio.run(asyncio.wait_for(run(), 20))
    sync = {name for name in vars(Client) if not name.startswith("_")}
    assert sync == {name for name in vars(AsyncClient) if not name.startswith("_")}


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ({"content": [{"type": "text"}]}, "a content part must have 'text'"),
        ({"content": ["hi"]}, "a content part must be an object, got 'hi'"),
        ({"content": [{"type": "image_url"}]}, "a content part must have 'image_url'"),
        ({"content": [{"type": "image_url", "image_url": {}}]}, "image_url must have 'url'"),
        ({"tool_calls": [{"function": {}}]}, "a tool call's function must have 'name'"),
        ({"tool_calls": ["f"]}, "a tool call must be an object, got 'f'"),
    ],
)
def test_a_message_that_lacks_something_is_refused_in_words(message, words):
    with pytest.raises((TypeError, ValueError), match=words):
        library.requests.chat_request([{"role": "user"} | message], {})
