"""Python clients: one that blocks, one for asyncio. Needs grpcio and protobuf alone. Checks nothing: the server does.

    with Client("127.0.0.1:50051") as client:
        for event in client.chat([{"role": "user", "content": "Hello"}], temperature=0):
            print(event.text, end="")

Errors are `grpc.RpcError`, with the server's status and details.
"""

from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any

import grpc

from vivace.serving.protos.vivace.v1 import inference_pb2 as pb
from vivace.serving.protos.vivace.v1 import inference_pb2_grpc as pb_grpc

Prompt = str | Mapping[str, Sequence[int]] | Sequence[int]
Message = Mapping[str, str] | tuple[str, str]
PARTS = ("sampling", "response", "options")  # of a request; a parameter's name is in one of them
REASONS = {pb.Finish.REASON_STOP: "stop", pb.Finish.REASON_LENGTH: "length"}
HEALTH = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")
OPTIONS = (
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.max_receive_message_length", 64 << 20),
)


@dataclass(frozen=True, slots=True)
class Logprob:
    """One place: the token that stands there, and the best ones (id, logprob). A prompt's first place is empty."""

    token_id: int | None
    logprob: float | None
    rank: int | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Usage:
    """What a request took, in tokens and seconds."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_s: float
    first_token_s: float
    total_s: float
    num_preemptions: int


@dataclass(frozen=True, slots=True)
class Event:
    """A piece of a reply. The last one has `finish_reason` and `usage`."""

    request_id: str
    text: str  # the new piece only
    token_ids: tuple[int, ...]
    logprobs: tuple[Logprob, ...]
    prompt_logprobs: tuple[Logprob, ...]
    finish_reason: str | None  # `stop` or `length`
    stop_reason: int | str | None  # the stop token or stop string
    usage: Usage | None
    index: int  # which of the `n` replies


class Stream:
    """Events of one call as they come. `close` hangs up, and the server frees what the request held."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._is_closed = False

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        if self._is_closed:
            raise StopIteration
        return _event(next(self._call))

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._is_closed = True
        self._call.cancel()


class AsyncStream:
    """Events of one call as they come, for asyncio. `aclose` hangs up."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self._messages = call.__aiter__()
        self._is_closed = False

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self._is_closed:
            raise StopAsyncIteration
        return _event(await anext(self._messages))

    async def aclose(self) -> None:
        """Hang up. Idempotent."""
        self._is_closed = True
        self._call.cancel()


class Client:
    """A connection to one server. Thread-safe. `timeout` (seconds) of a call becomes its deadline."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target, options=OPTIONS)
        self._stub = pb_grpc.InferenceStub(self._channel)

    def __enter__(self) -> "Client":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def generate(self, prompt: Prompt, *, timeout: float | None = None, **params: Any) -> Stream:
        """Continue a prompt: text, token ids, or `{"prompt_token_ids": [...]}`. `params`: the proto's names."""
        return Stream(self._stub.Generate(_generate_request(prompt, params), timeout=timeout))

    def chat(
        self, messages: Sequence[Message], *, timeout: float | None = None, **params: Any
    ) -> Stream:
        """The next turn of a conversation of `{"role": ..., "content": ...}`. `params`: the proto's names."""
        return Stream(self._stub.Chat(_chat_request(messages, params), timeout=timeout))

    def abort(self, request_id: str, *, timeout: float | None = None) -> bool:
        """End a request by its id; whether there was one."""
        request = pb.AbortRequest(request_id=request_id)
        return bool(self._stub.Abort(request, timeout=timeout).found)

    def model_info(self, *, timeout: float | None = None) -> pb.GetModelInfoResponse:
        """What is served."""
        return self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=timeout)

    def server_info(self, *, timeout: float | None = None) -> pb.GetServerInfoResponse:
        """How it is served."""
        return self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=timeout)

    def loads(self, *, timeout: float | None = None) -> pb.GetLoadsResponse:
        """How busy it is."""
        return self._stub.GetLoads(pb.GetLoadsRequest(), timeout=timeout)

    def health(self, *, timeout: float | None = None) -> str:
        """`SERVING` or `NOT_SERVING`."""
        return _health(self._channel)(b"", timeout=timeout)

    def close(self) -> None:
        """Close the connection; calls that run are cancelled."""
        self._channel.close()


class AsyncClient:
    """A connection to one server, for asyncio."""

    def __init__(self, target: str) -> None:
        self._channel = grpc.aio.insecure_channel(target, options=OPTIONS)
        self._stub = pb_grpc.InferenceStub(self._channel)

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
        self, prompt: Prompt, *, timeout: float | None = None, **params: Any
    ) -> AsyncStream:
        """See `Client.generate`."""
        return AsyncStream(self._stub.Generate(_generate_request(prompt, params), timeout=timeout))

    def chat(
        self, messages: Sequence[Message], *, timeout: float | None = None, **params: Any
    ) -> AsyncStream:
        """See `Client.chat`."""
        return AsyncStream(self._stub.Chat(_chat_request(messages, params), timeout=timeout))

    async def abort(self, request_id: str, *, timeout: float | None = None) -> bool:
        """See `Client.abort`."""
        request = pb.AbortRequest(request_id=request_id)
        return bool((await self._stub.Abort(request, timeout=timeout)).found)

    async def model_info(self, *, timeout: float | None = None) -> pb.GetModelInfoResponse:
        """What is served."""
        return await self._stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=timeout)

    async def server_info(self, *, timeout: float | None = None) -> pb.GetServerInfoResponse:
        """How it is served."""
        return await self._stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=timeout)

    async def loads(self, *, timeout: float | None = None) -> pb.GetLoadsResponse:
        """How busy it is."""
        return await self._stub.GetLoads(pb.GetLoadsRequest(), timeout=timeout)

    async def health(self, *, timeout: float | None = None) -> str:
        """`SERVING` or `NOT_SERVING`."""
        status: str = await _health(self._channel)(b"", timeout=timeout)
        return status

    async def close(self) -> None:
        """Close the connection; calls that run are cancelled."""
        await self._channel.close()


def _generate_request(prompt: Prompt, params: Mapping[str, Any]) -> pb.GenerateRequest:
    request = pb.GenerateRequest()
    if isinstance(prompt, str):
        request.text = prompt
    else:
        ids = prompt["prompt_token_ids"] if isinstance(prompt, Mapping) else prompt
        request.token_ids.ids.extend(ids)
        request.token_ids.SetInParent()  # an empty list of ids is not an unset prompt
    _set_params(request, params)
    return request


def _chat_request(messages: Sequence[Message], params: Mapping[str, Any]) -> pb.ChatRequest:
    request = pb.ChatRequest()
    for message in messages:
        fields = (
            message
            if isinstance(message, Mapping)
            else dict(zip(("role", "content"), message, strict=True))
        )
        request.messages.add(**fields)
    _set_params(request, params)
    return request


def _set_params(request: Any, params: Mapping[str, Any]) -> None:
    """Put each parameter where the proto has it. Raises TypeError for a name that it has nowhere."""
    for name, value in params.items():
        homes = [request, *(getattr(request, part) for part in PARTS)]
        home = next((one for one in homes if name in one.DESCRIPTOR.fields_by_name), None)
        if home is None:
            raise TypeError(f"unknown parameter {name!r}")
        if value is None:
            continue
        field = home.DESCRIPTOR.fields_by_name[name]
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            getattr(home, name).update(value)
        elif field.is_repeated:
            getattr(home, name).extend([value] if isinstance(value, str) else value)
        elif field.message_type is not None:
            getattr(home, name).CopyFrom(value)
        else:
            setattr(home, name, value)


def _event(message: pb.GenerateResponse) -> Event:
    finish = message.finish if message.HasField("finish") else None
    stop = finish.WhichOneof("stop") if finish is not None else None
    return Event(
        request_id=message.request_id,
        text=message.text,
        token_ids=tuple(message.token_ids),
        logprobs=tuple(map(_logprob, message.logprobs)),
        prompt_logprobs=tuple(map(_logprob, message.prompt_logprobs)),
        finish_reason=None if finish is None else REASONS[finish.reason],
        stop_reason=None if stop is None else getattr(finish, stop),
        usage=None if finish is None else _usage(finish.usage),
        index=message.index,
    )


def _logprob(place: pb.TokenLogprobs) -> Logprob:
    is_empty = not place.HasField("token_id")
    return Logprob(
        token_id=None if is_empty else place.token_id,
        logprob=None if is_empty else place.logprob,
        rank=None if is_empty else place.rank,
        top=tuple((one.token_id, one.logprob) for one in place.top),
    )


def _usage(usage: pb.Usage) -> Usage:
    return Usage(**{field.name: getattr(usage, field.name) for field in fields(Usage)})


def _health(channel: Any) -> Callable[..., Any]:
    """The standard health check, without its package: the request is empty, the answer one small number."""
    return channel.unary_unary(
        "/grpc.health.v1.Health/Check",
        request_serializer=bytes,
        response_deserializer=lambda data: HEALTH[data[1] if len(data) == 2 else 0],
    )
