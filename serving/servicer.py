"""The wire: protobuf in, protobuf out, errors to status codes. Nothing is decided here."""

import asyncio
import re
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass

import grpc

from vivace import __version__
from vivace.engine.completion import TextEvent, stream
from vivace.engine.errors import EngineError, InvalidRequest
from vivace.engine.events import EngineInfo, EngineRequest, FinishReason
from vivace.engine.runtimes import Engine
from vivace.engine.sampling import GenerationDefaults, ModelLimits, check_prompt, resolve
from vivace.engine.tokenizer import Tokenizer
from vivace.serving import convert
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb
from vivace.serving.protos.vivace.v1 import inference_pb2_grpc as pb_grpc
from vivace.serving.request_log import LogEntry, RequestLog
from vivace.serving.status import (
    AlreadyExists,
    Cancelled,
    DeadlineExceeded,
    NotFound,
    NotReady,
    abort,
    status_of,
)

REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")  # goes into log lines: no line ends, no escapes
DEADLINE_SLACK_S = 0.05  # a client hangs up at its deadline, by its own clock
LONG_TEXT_CHARS = 4096  # longer ones are tokenized beside the loop, which has others to serve


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What the servicer serves, once it is loaded."""

    name: str
    engine: Engine
    info: EngineInfo
    tokenizer: Tokenizer
    defaults: GenerationDefaults

    @property
    def limits(self) -> ModelLimits:
        """What requests are measured against."""
        return ModelLimits(self.info.vocab_size, self.info.max_context_tokens, self.defaults)


class InferenceServicer(pb_grpc.InferenceServicer):
    """Implements `inference.proto` on one model. Until `model` is set, and while draining, calls end UNAVAILABLE."""

    def __init__(self, log: RequestLog) -> None:
        self.model: ServedModel | None = None
        self.is_draining = False
        self._log = log
        self._started = time.monotonic()
        self._active: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def wait_idle(self) -> None:
        """Until no request runs."""
        await self._idle.wait()

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Stream the continuation of a prompt.

        gRPC cancels this coroutine when the client hangs up or its deadline passes. That closes the events, and closing
        the events is how the engine learns to stop.
        """
        async with aclosing(self._respond("Generate", request, context, _prompt)) as responses:
            async for response in responses:
                yield response

    async def Chat(
        self, request: pb.ChatRequest, context: grpc.aio.ServicerContext
    ) -> AsyncIterator[pb.GenerateResponse]:
        """Stream the next turn of a conversation."""
        async with aclosing(self._respond("Chat", request, context, _conversation)) as responses:
            async for response in responses:
                yield response

    async def Abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        """End a request by its id."""
        try:
            if not request.HasField("request_id"):
                raise InvalidRequest("request_id must be set")
            found = await self._served(None).engine.abort(request.request_id)
            return pb.AbortResponse(found=found)
        except EngineError as error:
            await abort(context, error)

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        """What is served."""
        try:
            model = self._served(request.model if request.HasField("model") else None)
        except EngineError as error:
            await abort(context, error)
        template = model.tokenizer.has_chat_template
        return convert.model_info(
            model.name, model.info, model.defaults, has_chat_template=template
        )

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        """How it is served."""
        try:
            info = self._served(None).info
        except EngineError as error:
            await abort(context, error)
        uptime = time.monotonic() - self._started
        return convert.server_info(info, version=__version__, uptime_s=uptime)

    async def GetLoads(
        self, request: pb.GetLoadsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetLoadsResponse:
        """How busy it is."""
        try:
            model = self._served(request.model if request.HasField("model") else None)
            return convert.loads(await model.engine.loads())
        except EngineError as error:
            await abort(context, error)

    async def _respond(
        self,
        rpc: str,
        request: convert.Request,
        context: grpc.aio.ServicerContext,
        encode: "Encode",
    ) -> AsyncGenerator[pb.GenerateResponse]:
        """One generation, from its protobuf to its log line."""
        request_id = request.request_id if request.HasField("request_id") else uuid.uuid4().hex
        is_good_id = REQUEST_ID.fullmatch(request_id) is not None
        entry = LogEntry(id=request_id if is_good_id else "(bad)", rpc=rpc)
        try:
            if not is_good_id:
                raise InvalidRequest(
                    f"request_id must be 1..128 of [A-Za-z0-9._:-], got {request_id[:140]!r}"
                )
            model = self._accept(request)
            events = self._generate(model, request_id, request, context, encode=encode, entry=entry)
            async with aclosing(events):
                async for event in events:
                    entry.note(event)
                    yield convert.response(_checked(event, entry))
            entry.code = "OK"
        except EngineError as error:
            entry.code = status_of(error).name
            await abort(context, error)
        except (asyncio.CancelledError, GeneratorExit):
            # The client hung up, or its deadline passed.
            entry.code = _why_ended(context)
            raise
        finally:
            self._log.write(entry)

    def _accept(self, request: convert.Request) -> ServedModel:
        if self.is_draining:
            raise NotReady("the server is draining")
        model = self._served(request.model if request.HasField("model") else None)
        convert.refuse_unserved(request)
        return model

    async def _generate(
        self,
        model: ServedModel,
        request_id: str,
        request: convert.Request,
        context: grpc.aio.ServicerContext,
        *,
        encode: "Encode",
        entry: LogEntry,
    ) -> AsyncGenerator[TextEvent]:
        if request_id in self._active:
            raise AlreadyExists(f"request_id {request_id!r} is in use")
        remaining = context.time_remaining()
        deadline = None if remaining is None else time.monotonic() + remaining
        self._active.add(request_id)
        self._idle.clear()
        try:
            token_ids = await encode(model, request)
            entry.prompt_tokens = len(token_ids)
            check_prompt(token_ids, model.limits)
            params = convert.sampling_params(request)
            sampling, rules = resolve(params, model.limits, len(token_ids))
            salt = request.options.cache_salt.encode()
            wanted = EngineRequest(request_id, tuple(token_ids), sampling, deadline, salt)
            async with aclosing(stream(model.engine, model.tokenizer, wanted, rules)) as events:
                async for event in events:
                    yield event
        finally:
            self._active.discard(request_id)
            if not self._active:
                self._idle.set()

    def _served(self, name: str | None) -> ServedModel:
        if self.model is None:
            raise NotReady("the model is loading")
        if name is not None and name != self.model.name:
            raise NotFound(f"model {name[:80]!r} is not served here; {self.model.name!r} is")
        return self.model


Encode = Callable[[ServedModel, convert.Request], Awaitable[list[int]]]


async def _prompt(model: ServedModel, request: convert.Request) -> list[int]:
    assert isinstance(request, pb.GenerateRequest)
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("prompt must be set: text or token_ids")
    if kind == "token_ids":
        return list(request.token_ids.ids)
    return await _encode(model.tokenizer, request.text, add_special_tokens=True)


async def _conversation(model: ServedModel, request: convert.Request) -> list[int]:
    assert isinstance(request, pb.ChatRequest)
    wants_turn = request.add_generation_prompt or not request.HasField("add_generation_prompt")
    text = model.tokenizer.render_chat(
        convert.chat_messages(request), add_generation_prompt=wants_turn
    )
    return await _encode(model.tokenizer, text, add_special_tokens=False)


async def _encode(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    if len(text) < LONG_TEXT_CHARS:
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)
    return await asyncio.to_thread(tokenizer.encode, text, add_special_tokens=add_special_tokens)


def _why_ended(context: grpc.aio.ServicerContext) -> str:
    """The status that the client sees of a call that gRPC ended from under us."""
    remaining = context.time_remaining()
    is_late = remaining is not None and remaining < DEADLINE_SLACK_S
    return "DEADLINE_EXCEEDED" if is_late else "CANCELLED"


def _checked(event: TextEvent, entry: LogEntry) -> TextEvent:
    """The event, unless it is the end of a request that did not end by itself."""
    if event.finish is None:
        return event
    entry.reason = event.finish.value
    if event.finish is FinishReason.ABORT:
        raise Cancelled("aborted by its id")
    if event.finish is FinishReason.DEADLINE:
        raise DeadlineExceeded("the deadline has passed")
    return event
