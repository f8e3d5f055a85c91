"""The wire: protobuf in, protobuf out. Decides nothing; raises errors, of which `boundary` makes statuses.

gRPC cancels a handler when its client hangs up or its deadline passes. That closes the events it reads, and closing them
is how the engine learns to stop.
"""

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import AbstractContextManager, aclosing, suppress

import grpc
import msgspec

from vivace import __version__
from vivace.engine import scoring
from vivace.engine.completion import TextEvent
from vivace.engine.concurrent import merge
from vivace.engine.errors import EngineError, InvalidRequest, Overloaded
from vivace.engine.events import EngineRequest, Pooling
from vivace.engine.replies import stream_replies
from vivace.engine.sampling import (
    TextRules,
    check_count,
    check_logprobs,
    check_prompt,
    check_token_ids,
    resolve,
    resolve_replies,
)
from vivace.serving import convert
from vivace.serving.convert import optional
from vivace.serving.models import Models, ServedModel
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb
from vivace.serving.protos.vivace.v1 import inference_pb2_grpc as pb_grpc
from vivace.serving.running import Running, RunningRequests
from vivace.serving.status import NotReady, details_of, status_of

MAX_BATCH_ITEMS = 1024
MAX_TEXTS = 256  # of one Embed or Score
MAX_DETOKENIZED = 1 << 17
MAX_WATCHERS = 64
WATCH_MS = (10, 60_000)  # between two loads
DEFAULT_WATCH_MS = 1000

Places = dict[str, asyncio.Semaphore]  # by model: what one call may yet have in its engine


class InferenceServicer(pb_grpc.InferenceServicer):
    """Implements `inference.proto`. The server fills `models` as they load."""

    def __init__(self, models: Models, running: RunningRequests) -> None:
        self._models = models
        self._running = running
        self._started = time.monotonic()
        self._num_watchers = 0

    async def Generate(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """Stream the continuations of a prompt."""
        await self._stream("Generate", request, context)

    async def Chat(self, request: pb.ChatRequest, context: grpc.aio.ServicerContext) -> None:
        """Stream the next turn of a conversation."""
        await self._stream("Chat", request, context)

    async def GenerateUnary(
        self, request: pb.GenerateRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateUnaryResponse:
        """The continuations of a prompt, whole."""
        with self._run("GenerateUnary", request, context) as running:
            return await self._whole(request, running, {})

    async def ChatUnary(
        self, request: pb.ChatRequest, context: grpc.aio.ServicerContext
    ) -> pb.GenerateUnaryResponse:
        """The next turn of a conversation, whole."""
        with self._run("ChatUnary", request, context) as running:
            return await self._whole(request, running, {})

    async def Batch(self, request: pb.BatchRequest, context: grpc.aio.ServicerContext) -> None:
        """Each item's outcome as it ends."""
        check_count("items", len(request.items), MAX_BATCH_ITEMS)
        with self._running.run("Batch", None, _deadline(context)) as running:
            places: Places = {}
            outcomes = [
                self._outcome(index, item, running, places)
                for index, item in enumerate(request.items)
            ]
            num_left = len(outcomes)
            async with aclosing(merge(outcomes, max_parallel=self._max_parallel())) as responses:
                async for response in responses:
                    num_left -= 1
                    await running.write(context, response, is_last=not num_left)

    async def Embed(
        self, request: pb.EmbedRequest, context: grpc.aio.ServicerContext
    ) -> pb.EmbedResponse:
        """The pooled final hidden state of each input."""
        with self._run("Embed", request, context) as running:
            model = self._accept(request)
            check_count("inputs", len(request.inputs), MAX_TEXTS)
            pooling = _pooling(request)
            prompts = [
                await model.encode_prompt(prompt, f"inputs[{i}]")
                for i, prompt in enumerate(request.inputs)
            ]
            for i, token_ids in enumerate(prompts):
                check_prompt(token_ids, model.limits, name=f"inputs[{i}]", min_room=0)
            running.entry.prompt_tokens = sum(map(len, prompts))
            found = await scoring.embed(
                model.engine,
                _call(model, request.options, running),
                prompts,
                pooling=pooling,
                normalize=request.normalize or not request.HasField("normalize"),
            )
            return convert.embed_response(running.id, found)

    async def Score(
        self, request: pb.ScoreRequest, context: grpc.aio.ServicerContext
    ) -> pb.ScoreResponse:
        """The logprobs of each continuation."""
        with self._run("Score", request, context) as running:
            model = self._accept(request)
            limits = model.limits
            check_count("continuations", len(request.continuations), MAX_TEXTS)
            logprobs = check_logprobs("logprobs", optional(request, "logprobs"), limits)
            of_prompt = check_logprobs(
                "prompt_logprobs", optional(request, "prompt_logprobs"), limits
            )
            prompt = await model.encode_prompt(request.prompt, "prompt")
            check_prompt(prompt, limits)
            running.entry.prompt_tokens = len(prompt)
            continuations = []
            for i, continuation in enumerate(request.continuations):
                name = f"continuations[{i}]"
                token_ids = await model.encode_continuation(
                    request.prompt, prompt, continuation, name
                )
                check_prompt(token_ids, limits, name=name, min_room=len(prompt))
                continuations.append(token_ids)
            scores, prompt_places = await scoring.score(
                model.engine,
                _call(model, request.options, running),
                prompt,
                continuations,
                num_logprobs=logprobs or 0,
                prompt_logprobs=of_prompt,
            )
            return await convert.score_response(
                running.id,
                scores,
                prompt_tokens=len(prompt),
                prompt_logprobs=prompt_places,
                shows_places=logprobs is not None,
            )

    async def Tokenize(
        self, request: pb.TokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.TokenizeResponse:
        """Token ids of a text or conversation."""
        with self._running.aside():
            model = self._accept(request)
            match request.WhichOneof("input"):
                case "text":
                    adds = request.add_special_tokens or not request.HasField("add_special_tokens")
                    token_ids = await model.encode(request.text, add_special_tokens=adds)
                case "chat":
                    if request.HasField("add_special_tokens"):
                        got = request.add_special_tokens
                        raise InvalidRequest(
                            f"add_special_tokens must not be set with chat, got {got}"
                        )
                    token_ids = await model.encode_chat(request.chat)
                case _:
                    raise InvalidRequest("input must be set: text or chat")
            tokens = await model.token_texts(token_ids) if request.return_tokens else []
            most = model.info.max_context_tokens
            return pb.TokenizeResponse(token_ids=token_ids, tokens=tokens, max_context_tokens=most)

    async def Detokenize(
        self, request: pb.DetokenizeRequest, context: grpc.aio.ServicerContext
    ) -> pb.DetokenizeResponse:
        """Text of token ids."""
        with self._running.aside():
            model = self._models.find(optional(request, "model"))
            token_ids = list(request.token_ids)
            check_count("token_ids", len(token_ids), MAX_DETOKENIZED)
            check_token_ids("token_ids", token_ids, model.limits)
            skips = request.skip_special_tokens or not request.HasField("skip_special_tokens")
            text = await model.decode(token_ids, skip_special_tokens=skips)
            return pb.DetokenizeResponse(text=text)

    async def Abort(
        self, request: pb.AbortRequest, context: grpc.aio.ServicerContext
    ) -> pb.AbortResponse:
        """End a request by its id."""
        if not request.HasField("request_id"):
            raise InvalidRequest("request_id must be set")
        return pb.AbortResponse(found=self._running.abort(request.request_id))

    async def GetModelInfo(
        self, request: pb.GetModelInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetModelInfoResponse:
        """What is served."""
        model = self._models.find(optional(request, "model"))
        template = model.tokenizer.has_chat_template
        return convert.model_info(
            model.name, model.info, model.defaults, has_chat_template=template
        )

    async def GetServerInfo(
        self, request: pb.GetServerInfoRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetServerInfoResponse:
        """How it is served."""
        model = self._models.find(optional(request, "model"))
        uptime = time.monotonic() - self._started
        return convert.server_info(
            model.info, version=__version__, uptime_s=uptime, models=self._models.names
        )

    async def GetLoads(
        self, request: pb.GetLoadsRequest, context: grpc.aio.ServicerContext
    ) -> pb.GetLoadsResponse:
        """How busy it is."""
        with self._running.aside():
            model = self._models.find(optional(request, "model"))
            return convert.loads(await model.engine.loads())

    async def WatchLoads(
        self, request: pb.WatchLoadsRequest, context: grpc.aio.ServicerContext
    ) -> None:
        """How busy it is, again and again."""
        model = self._models.find(optional(request, "model"))
        interval_ms = DEFAULT_WATCH_MS
        if request.HasField("interval_ms"):
            interval_ms = request.interval_ms
        if not WATCH_MS[0] <= interval_ms <= WATCH_MS[1]:
            raise InvalidRequest(
                f"interval_ms must be in {WATCH_MS[0]}..{WATCH_MS[1]}, got {interval_ms}"
            )
        if self._num_watchers >= MAX_WATCHERS:
            raise Overloaded(f"{MAX_WATCHERS} callers are watching already")
        self._num_watchers += 1
        try:
            with self._running.run("WatchLoads", None, _deadline(context)) as running:
                while True:
                    await running.write(context, convert.loads(await model.engine.loads()))
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._running.wait_draining(), interval_ms / 1e3)
                        raise NotReady("the server is draining")
        finally:
            self._num_watchers -= 1

    def _run(
        self, rpc: str, request: convert.Call, context: grpc.aio.ServicerContext
    ) -> AbstractContextManager[Running]:
        return self._running.run(rpc, optional(request, "request_id"), _deadline(context))

    def _accept(self, request: convert.Call | pb.TokenizeRequest) -> ServedModel:
        model = self._models.find(optional(request, "model"))
        convert.refuse_unserved(request)
        return model

    def _max_parallel(self) -> int:
        """Items of a batch that run at a time; those of many replies wait for each other's places in the engine."""
        return sum(model.max_parallel for model in self._models.loaded.values()) or 1

    async def _stream(
        self, rpc: str, request: convert.Request, context: grpc.aio.ServicerContext
    ) -> None:
        with self._run(rpc, request, context) as running:
            num_left = request.sampling.n or 1
            async with aclosing(self._events(request, running, {})) as events:
                async for event in events:
                    num_left -= event.finish is not None
                    message = await convert.response(event)
                    await running.write(context, message, is_last=not num_left)

    async def _whole(
        self, request: convert.Request, running: Running, places: Places
    ) -> pb.GenerateUnaryResponse:
        async with aclosing(self._events(request, running, places)) as events:
            found = [event async for event in events]
        return await convert.unary_response(running.id, found)

    async def _outcome(
        self, index: int, item: pb.BatchItem, batch: Running, places: Places
    ) -> AsyncGenerator[pb.BatchResponse]:
        """The one response to an item of a batch."""
        try:
            kind = item.WhichOneof("request")
            if kind is None:
                raise InvalidRequest(f"items[{index}] must be set: generate or chat")
            request = getattr(item, kind)
            with self._running.run(
                "Batch", optional(request, "request_id"), batch.deadline, is_part=True
            ) as running:
                response = await self._whole(request, running, places)
        except EngineError as error:
            code, details = status_of(error).value[0], details_of(error)
            failed = pb.BatchError(code=code, message=details)
            yield pb.BatchResponse(index=index, error=failed)
        else:
            yield pb.BatchResponse(index=index, response=response)

    async def _events(
        self, request: convert.Request, running: Running, places: Places
    ) -> AsyncGenerator[TextEvent]:
        """One generation, from its protobuf to its last event."""
        model = self._accept(request)
        if isinstance(request, pb.ChatRequest):
            token_ids = await model.encode_chat(request)
        else:
            token_ids = await model.encode_prompt(request, "prompt")
        running.entry.prompt_tokens = len(token_ids)
        check_prompt(token_ids, model.limits)
        params = convert.sampling_params(request)
        sampling, rules = resolve(params, model.limits, len(token_ids))
        replies = resolve_replies(params)
        wanted = EngineRequest(
            running.id,
            tuple(token_ids),
            sampling,
            running.deadline,
            request.options.cache_salt.encode(),
            request.options.priority,
        )
        echo = await _echo(model, request, token_ids, rules) if rules.echo else ""
        begun: set[int] = set()  # what the engine refuses may be tried again: nothing goes before
        free = places.setdefault(model.name, asyncio.Semaphore(model.max_parallel))
        async with aclosing(
            stream_replies(
                model.engine, model.tokenizer, wanted, rules=rules, replies=replies, places=free
            )
        ) as events:
            async for event in events:
                running.entry.note(event)
                if echo and event.index not in begun:
                    begun.add(event.index)
                    event = msgspec.structs.replace(event, text=echo + event.text)
                yield event


async def _echo(
    model: ServedModel, request: convert.Request, token_ids: list[int], rules: TextRules
) -> str:
    """What stands before the reply."""
    if isinstance(request, pb.GenerateRequest):
        if request.WhichOneof("prompt") == "text":
            return request.text
        return await model.decode(token_ids, skip_special_tokens=rules.skip_special_tokens)
    if not request.continue_final_message:
        raise InvalidRequest("echo needs continue_final_message in Chat, got True")
    return convert.content_of(request.messages[-1])


def _call(model: ServedModel, options: pb.RequestOptions, running: Running) -> scoring.Call:
    if options.HasField("sparse"):
        raise InvalidRequest(
            "options.sparse must not be set in Embed and Score, which decode nothing"
        )
    return scoring.Call(
        running.id,
        running.deadline,
        options.cache_salt.encode(),
        options.priority,
        model.max_parallel,
    )


def _pooling(request: pb.EmbedRequest) -> Pooling:
    if not request.HasField("pooling"):
        return Pooling.MEAN
    if request.pooling not in convert.POOLING:
        raise InvalidRequest(f"pooling must be POOLING_MEAN or POOLING_LAST, got {request.pooling}")
    return convert.POOLING[request.pooling]


def _deadline(context: grpc.aio.ServicerContext) -> float | None:
    """When the call's time is up; of `time.monotonic()`."""
    remaining = context.time_remaining()
    return None if remaining is None else time.monotonic() + remaining
