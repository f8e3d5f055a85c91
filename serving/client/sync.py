"""The client that blocks. Thread-safe."""

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from functools import partial
from types import TracebackType
from typing import Any, Unpack

import grpc

from vivace.serving.client import batch, requests, results
from vivace.serving.client.batch import Answer, Outcome, Progress
from vivace.serving.client.connection import OPTIONS, health_check, seconds
from vivace.serving.client.errors import VivaceError, closed
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
from vivace.serving.client.retry import Messages, Retries, Timer, Waits, check_retries, unary
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb
from vivace.serving.protos.vivace.v1 import inference_pb2_grpc as pb_grpc


class Stream:
    """Events of one call as they come. `close`, or forgetting it, hangs up, and the server frees what it held."""

    def __init__(self, messages: Messages) -> None:
        self._messages = messages
        self._is_closed = False

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __iter__(self) -> "Stream":
        return self

    def __next__(self) -> Event:
        if self._is_closed:
            raise StopIteration
        try:
            return results.event(next(self._messages))
        except VivaceError:
            if self._is_closed:  # by another thread, while this one waited
                raise StopIteration from None
            raise

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._is_closed = True
        self._messages.cancel()


class Client:
    """A connection to one server.

    `timeout`: seconds that every call gets, its retries included, unless it has one of its own (`math.inf`: none).
    `max_retries`: how often a call is tried again that the server refused for now, before its first message; 0..4.
    """

    def __init__(self, target: str, *, timeout: float | None = None, max_retries: int = 3) -> None:
        self._max_retries = check_retries(max_retries)
        self._waits = Waits()
        self._channel = grpc.insecure_channel(target, options=OPTIONS)
        self._stub = pb_grpc.InferenceStub(self._channel)
        self._timeout = timeout

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def generate(
        self, prompt: Prompt, *, timeout: float | None = None, **params: Unpack[Params]
    ) -> Stream:
        """Continue a prompt: text, token ids, or `{"prompt_token_ids": [...]}`."""
        request = requests.generate_request(prompt, params)
        return Stream(self._stream(self._stub.Generate, request, timeout))

    def chat(
        self,
        messages: Sequence[Message],
        *,
        timeout: float | None = None,
        **params: Unpack[Params],
    ) -> Stream:
        """The next turn of a conversation of `{"role": ..., "content": ...}`."""
        request = requests.chat_request(messages, params)
        return Stream(self._stream(self._stub.Chat, request, timeout))

    def complete(
        self, prompt: Prompt, *, timeout: float | None = None, **params: Unpack[Params]
    ) -> Completion:
        """`generate`, all of it at once."""
        request = requests.generate_request(prompt, params)
        return results.completion(self._unary(self._stub.GenerateUnary, request, timeout))

    def complete_chat(
        self,
        messages: Sequence[Message],
        *,
        timeout: float | None = None,
        **params: Unpack[Params],
    ) -> Completion:
        """`chat`, all of it at once."""
        request = requests.chat_request(messages, params)
        return results.completion(self._unary(self._stub.ChatUnary, request, timeout))

    def batch(
        self,
        items: Sequence[BatchItem],
        *,
        progress: Progress | None = None,
        timeout: float | None = None,
        max_parallel: int = 4,
        **params: Unpack[Params],
    ) -> list[Outcome]:
        """What became of each item, in their order: a completion, or the error that it alone ended with.

        An item is a prompt, or `{"prompt": ..., **params}` or `{"messages": ..., **params}` with parameters of its own;
        `params` are all items'. `progress(done, total)` is called as each ends. Large batches are split into calls, of
        which `max_parallel` run at a time; `timeout` is that of all of them together.
        """
        answers = self.batch_iter(items, timeout=timeout, max_parallel=max_parallel, **params)
        with closing(answers):
            return batch.collect(answers, len(items), progress)

    def batch_iter(
        self,
        items: Sequence[BatchItem],
        *,
        timeout: float | None = None,
        max_parallel: int = 4,
        **params: Unpack[Params],
    ) -> Generator[Answer, None, None]:
        """`batch`, each (index, outcome) as it ends. Closing the iterator cancels the rest."""
        calls = batch.split([requests.batch_item(item, params) for item in items])
        timer = Timer(seconds(timeout, self._timeout))

        def start(request: pb.BatchRequest) -> Messages:
            return self._stream(self._stub.Batch, request, timer.left())

        return batch.run(calls, start, max_parallel)

    def embed(
        self,
        inputs: str | Sequence[Prompt],
        *,
        timeout: float | None = None,
        **params: Unpack[EmbedParams],
    ) -> tuple[Embedding, ...]:
        """The model's final hidden state of each input, pooled."""
        request = requests.embed_request(inputs, params)
        return results.embeddings(self._unary(self._stub.Embed, request, timeout))

    def score(
        self,
        prompt: Prompt,
        continuations: str | Sequence[Prompt],
        *,
        timeout: float | None = None,
        **params: Unpack[ScoreParams],
    ) -> Scores:
        """How probable the model finds each continuation of a prompt."""
        request = requests.score_request(prompt, continuations, params)
        return results.scores(self._unary(self._stub.Score, request, timeout))

    def tokenize(
        self,
        source: str | Sequence[Message],
        *,
        timeout: float | None = None,
        **params: Unpack[TokenizeParams],
    ) -> Tokens:
        """Token ids of a text, or of a conversation as the chat template renders it."""
        request = requests.tokenize_request(source, params)
        return results.tokens(self._unary(self._stub.Tokenize, request, timeout))

    def detokenize(
        self,
        token_ids: Sequence[int],
        *,
        skip_special_tokens: bool | None = None,
        model: str | None = None,
        timeout: float | None = None,
    ) -> str:
        """Text of token ids."""
        request = pb.DetokenizeRequest(
            token_ids=token_ids, skip_special_tokens=skip_special_tokens, model=model
        )
        return str(self._unary(self._stub.Detokenize, request, timeout).text)

    def abort(self, request_id: str, *, timeout: float | None = None) -> bool:
        """End a request by its id; whether there was one."""
        request = pb.AbortRequest(request_id=request_id)
        return bool(self._unary(self._stub.Abort, request, timeout).found)

    def model_info(
        self, *, model: str | None = None, timeout: float | None = None
    ) -> pb.GetModelInfoResponse:
        """What is served."""
        request = pb.GetModelInfoRequest(model=model)
        return self._unary(self._stub.GetModelInfo, request, timeout)

    def server_info(
        self, *, model: str | None = None, timeout: float | None = None
    ) -> pb.GetServerInfoResponse:
        """How it is served."""
        request = pb.GetServerInfoRequest(model=model)
        return self._unary(self._stub.GetServerInfo, request, timeout)

    def loads(
        self, *, model: str | None = None, timeout: float | None = None
    ) -> pb.GetLoadsResponse:
        """How busy it is."""
        return self._unary(self._stub.GetLoads, pb.GetLoadsRequest(model=model), timeout)

    def watch_loads(
        self,
        *,
        interval_ms: int | None = None,
        model: str | None = None,
        timeout: float = math.inf,
    ) -> Generator[pb.GetLoadsResponse, None, None]:
        """How busy it is, again and again, until the iterator is closed. The client's timeout does not end it."""
        request = pb.WatchLoadsRequest(model=model, interval_ms=interval_ms)
        yield from self._stream(self._stub.WatchLoads, request, timeout)

    def health(self, *, timeout: float | None = None) -> str:
        """`SERVING` or `NOT_SERVING`."""
        retries = Retries(seconds(timeout, self._timeout), 0)  # it tells of now
        return str(unary(partial(_begin, health_check(self._channel), b""), retries, self._waits))

    def close(self) -> None:
        """Close the connection; calls that run are cancelled."""
        self._waits.close()
        self._channel.close()

    def _unary(self, method: Any, request: Any, timeout: float | None) -> Any:
        """Make a call that does not stream. Raises VivaceError."""
        return unary(partial(_begin, method, request), self._retries(timeout), self._waits)

    def _stream(self, method: Any, request: Any, timeout: float | None) -> Messages:
        """Begin a call that streams. Raises VivaceError."""
        return Messages(partial(_begin, method, request), self._retries(timeout), self._waits)

    def _retries(self, timeout: float | None) -> Retries:
        return Retries(seconds(timeout, self._timeout), self._max_retries)


def _begin(method: Any, request: Any, timeout: float) -> Any:
    try:
        return method(request, timeout=None if timeout == math.inf else timeout)
    except ValueError as error:  # gRPC's word for a channel that is closed
        raise closed() from error
