"""What a type checker makes of the clients: checked by mypy, never run."""

from collections.abc import Generator
from typing import assert_type

from vivace.serving.client import (
    AsyncClient,
    AsyncStream,
    Client,
    Completion,
    Embedding,
    Event,
    Outcome,
    Scores,
    Stream,
    Tokens,
    VivaceError,
)
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb

MESSAGES = [{"role": "user", "content": "Hello"}]


def sync(client: Client) -> None:
    """The client that blocks."""
    assert_type(client.chat(MESSAGES, temperature=0, stop=["a"]), Stream)
    for event in client.generate("Hello", seed=1, timeout=2.5):
        assert_type(event, Event)
        assert_type(event.finish_reason, str | None)
    assert_type(client.complete([1, 2], n=2), Completion)
    assert_type(client.complete_chat([("user", "Hello")]).text, str)
    assert_type(client.batch(["a", {"prompt": "b", "max_tokens": 2}]), list[Outcome])
    assert_type(client.batch_iter(["a"]), Generator[tuple[int, Outcome], None, None])
    assert_type(client.embed(["a"], pooling="mean"), tuple[Embedding, ...])
    assert_type(client.score("a", ["b"]), Scores)
    assert_type(client.tokenize(MESSAGES), Tokens)
    assert_type(client.detokenize([1]), str)
    assert_type(next(client.watch_loads()), pb.GetLoadsResponse)
    assert_type(client.model_info(), pb.GetModelInfoResponse)
    try:
        client.abort("id")
    except VivaceError as error:
        assert_type(error.retry_after_s, float | None)
        assert_type(error.details(), str)


async def asynchronous(client: AsyncClient) -> None:
    """The client for asyncio."""
    assert_type(client.chat(MESSAGES), AsyncStream)
    async for event in client.generate("Hello"):
        assert_type(event, Event)
    assert_type(await client.complete("a"), Completion)
    assert_type(await client.batch(["a"]), list[Outcome])
    assert_type(await anext(client.watch_loads()), pb.GetLoadsResponse)
    assert_type(await client.health(), str)


def wrong(client: Client) -> None:
    """What a type checker must refuse: an ignore that nothing needs is an error."""
    client.chat(MESSAGES, temprature=1)  # type: ignore[call-arg]
    client.generate("a", temperature="hot")  # type: ignore[arg-type]
    client.embed("a", pooling="max")  # type: ignore[arg-type]
    client.complete(5)  # type: ignore[arg-type]
