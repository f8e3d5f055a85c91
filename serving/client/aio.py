"""The client for asyncio."""

import asyncio
import math
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from functools import partial
from types import TracebackType
from typing import Any, Unpack

import grpc

from vivace.serving.client import batch, requests, results
from vivace.serving.client.batch import Answer, Outcome, Progress
from vivace.serving.client.connection import OPTIONS, health_check, seconds
from vivace.serving.client.errors import closed, is_task_cancelled
from vivace.serving.client.requests import (
    BatchItem,
    EmbedParams,
    Message,
    Params,
    Prompt,
    ScoreParams,
    TokenizeParams,
)
from vivace.serving.client.results import Completion, Embedding, Event, Scores, Tokens
from vivace.serving.client.retry import AsyncMessages, Retries, Timer, check_retries, unary_async
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb
from vivace.serving.protos.vivace.v1 import inference_pb2_grpc as pb_grpc


class AsyncStream:
    """Events of one call as they come. `aclose`, or forgetting it, hangs up, and the server frees what it held."""

    def __init__(self, messages: AsyncMessages) -> None:
        self._messages = messages
        self._is_closed = False
        self._loop = asyncio.get_running_loop()

    def __del__(self) -> None:
        # A call that nobody reads would run on: gRPC's own tasks keep it alive.
        if not self._messages.done() and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._messages.cancel)

    async def __aenter__(self) -> "AsyncStream":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> "AsyncStream":
        return self

    async def __anext__(self) -> Event:
        if self._is_closed:
            raise StopAsyncIteration
        try:
            return results.event(await anext(self._messages))
        except asyncio.CancelledError:
            if is_task_cancelled():
                raise
            if self._is_closed:  # by another task, while this one waited
                raise StopAsyncIteration from None
            raise closed() from None

    async def aclose(self) -> None:
        """Hang up. Idempotent."""
        self._is_closed = True
        self._messages.cancel()


class AsyncClient:
    """A connection to one server.

    `timeout`: seconds that every call gets, its retries included, unless it has one of its own (`math.inf`: none).
    `max_retries`: how often a call is tried again that the server refused for now, before its first message; 0..4.
    """

    def __init__(self, target: str, *, timeout: float | None = None, max_retries: int = 3) -> None:
        self._max_retries = check_retries(max_retries)
        self._is_closed = asyncio.Event()
        self._channel = grpc.aio.insecure_channel(target, options=OPTIONS)
        self._stub = pb_grpc.InferenceStub(self._channel)
        self._timeout = timeout

    async def __aenter__(self) -> "AsyncClient":
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **params: Unpack[Params]
    ) -> AsyncStream:
        """See `Client.generate`."""
        request = requests.generate_request(prompt, params)
        return AsyncStream(self._stream(self._stub.Generate, request, timeout))

    def chat(
        self,
        messages: Sequence[Message],
        *,
        timeout: float | None = None,
        **params: Unpack[Params],
    ) -> AsyncStream:
        """See `Client.chat`."""
        request = requests.chat_request(messages, params)
        return AsyncStream(self._stream(self._stub.Chat, request, timeout))

    async def complete(
        self, prompt: Prompt, *, timeout: float | None = None, **params: Unpack[Params]
    ) -> Completion:
        """See `Client.complete`."""
        request = requests.generate_request(prompt, params)
        return results.completion(await self._unary(self._stub.GenerateUnary, request, timeout))

    async def complete_chat(
        self,
        messages: Sequence[Message],
        *,
        timeout: float | None = None,
        **params: Unpack[Params],
    ) -> Completion:
        """See `Client.complete_chat`."""
        request = requests.chat_request(messages, params)
        return results.completion(await self._unary(self._stub.ChatUnary, request, timeout))

    async def batch(
        self,
        items: Sequence[BatchItem],
        *,
        progress: Progress | None = None,
        timeout: float | None = None,
        max_parallel: int = 4,
        **params: Unpack[Params],
    ) -> list[Outcome]:
        """See `Client.batch`."""
        answers = self.batch_iter(items, timeout=timeout, max_parallel=max_parallel, **params)
        async with aclosing(answers):
            return await batch.collect_async(answers, len(items), progress)

    def batch_iter(
        self,
        items: Sequence[BatchItem],
        *,
        timeout: float | None = None,
        max_parallel: int = 4,
        **params: Unpack[Params],
    ) -> AsyncGenerator[Answer]:
        """See `Client.batch_iter`."""
        calls = batch.split([requests.batch_item(item, params) for item in items])
        timer = Timer(seconds(timeout, self._timeout))

        def start(request: pb.BatchRequest) -> AsyncMessages:
            return self._stream(self._stub.Batch, request, timer.left())

        return batch.run_async(calls, start, max_parallel)

    async def embed(
        self,
        inputs: str | Sequence[Prompt],
        *,
        timeout: float | None = None,
        **params: Unpack[EmbedParams],
    ) -> tuple[Embedding, ...]:
        """See `Client.embed`."""
        request = requests.embed_request(inputs, params)
        return results.embeddings(await self._unary(self._stub.Embed, request, timeout))

    async def score(
        self,
        prompt: Prompt,
        continuations: str | Sequence[Prompt],
        *,
        timeout: float | None = None,
        **params: Unpack[ScoreParams],
    ) -> Scores:
        """See `Client.score`."""
        request = requests.score_request(prompt, continuations, params)
        return results.scores(await self._unary(self._stub.Score, request, timeout))

    async def tokenize(
        self,
        source: str | Sequence[Message],
        *,
        timeout: float | None = None,
        **params: Unpack[TokenizeParams],
    ) -> Tokens:
        """See `Client.tokenize`."""
        request = requests.tokenize_request(source, params)
        return results.tokens(await self._unary(self._stub.Tokenize, request, timeout))

    async def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        model: str | None = None,
        timeout: float | None = None,
    ) -> str:
        """See `Client.detokenize`."""
        request = pb.DetokenizeRequest(
            token_ids=token_ids, skip_special_tokens=skip_special_tokens, model=model
        )
        return str((await self._unary(self._stub.Detokenize, request, timeout)).text)

    async def abort(self, request_id: str, *, timeout: float | None = None) -> bool:
        """See `Client.abort`."""
        request = pb.AbortRequest(request_id=request_id)
        return bool((await self._unary(self._stub.Abort, request, timeout)).found)

    async def model_info(
        self, *, model: str | None = None, timeout: float | None = None
    ) -> pb.GetModelInfoResponse:
        """See `Client.model_info`."""
        request = pb.GetModelInfoRequest(model=model)
        return await self._unary(self._stub.GetModelInfo, request, timeout)

    async def server_info(
        self, *, model: str | None = None, timeout: float | None = None
    ) -> pb.GetServerInfoResponse:
        """See `Client.server_info`."""
        request = pb.GetServerInfoRequest(model=model)
        return await self._unary(self._stub.GetServerInfo, request, timeout)

    async def loads(
        self, *, model: str | None = None, timeout: float | None = None
    ) -> pb.GetLoadsResponse:
        """See `Client.loads`."""
        return await self._unary(self._stub.GetLoads, pb.GetLoadsRequest(model=model), timeout)

    async def watch_loads(
        self,
        *,
        interval_ms: int | None = None,
        model: str | None = None,
        timeout: float = math.inf,
    ) -> AsyncGenerator[pb.GetLoadsResponse]:
        """See `Client.watch_loads`."""
        request = pb.WatchLoadsRequest(model=model, interval_ms=interval_ms)
        call = self._stream(self._stub.WatchLoads, request, timeout)
        try:
            async for loads in call:
                yield loads
        except asyncio.CancelledError:
            if is_task_cancelled():
                raise
            raise closed() from None
        finally:
            call.cancel()

    async def health(self, *, timeout: float | None = None) -> str:
        """See `Client.health`."""
        retries = Retries(seconds(timeout, self._timeout), 0)  # it tells of now
        return str(await _unary(health_check(self._channel), b"", retries, self._is_closed))

    async def close(self) -> None:
        """Close the connection; calls that run are cancelled."""
        self._is_closed.set()
        await self._channel.close()

    async def _unary(self, method: Any, request: Any, timeout: float | None) -> Any:
        """Make a call that does not stream. Raises VivaceError."""
        return await _unary(method, request, self._retries(timeout), self._is_closed)

    def _stream(self, method: Any, request: Any, timeout: float | None) -> AsyncMessages:
        """Begin a call that streams. Raises VivaceError."""
        return AsyncMessages(
            partial(_begin, method, request), self._retries(timeout), self._is_closed
        )

    def _retries(self, timeout: float | None) -> Retries:
        return Retries(seconds(timeout, self._timeout), self._max_retries)


async def _unary(method: Any, request: Any, retries: Retries, is_closed: asyncio.Event) -> Any:
    try:
        return await unary_async(partial(_begin, method, request), retries, is_closed)
    except asyncio.CancelledError:
        if is_task_cancelled():
            raise
        raise closed() from None


def _begin(method: Any, request: Any, timeout: float) -> Any:
    try:
        return method(request, timeout=None if timeout == math.inf else timeout)
    except grpc.aio.UsageError as error:
        raise closed() from error
