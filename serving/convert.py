"""Protobuf to the engine's words and back. Refuses what is not served, by name; checks no values."""

import asyncio
from collections.abc import Sequence
from typing import Any

from vivace.engine.completion import TextEvent
from vivace.engine.conversation import ChatMessage, Conversation, ToolCall
from vivace.engine.errors import InvalidRequest, Unimplemented
from vivace.engine.events import (
    EngineInfo,
    FinishReason,
    Loads,
    Pooling,
    TokenLogprobs,
    Usage,
)
from vivace.engine.sampling import GenerationDefaults, SamplingParams, SparseParams
from vivace.engine.scoring import Embedding, Score
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb

SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens", "ignore_eos", "n",
    "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
RESPONSE = (
    "logprobs", "prompt_logprobs", "prompt_logprobs_start", "include_stop_str_in_output",
    "skip_special_tokens", "echo",
)  # fmt: skip
LISTS = ("stop", "stop_token_ids", "allowed_token_ids", "bad_token_ids")
CONVERSATION = {"messages", "continue_final_message", "add_generation_prompt", "template_variables"}
CALL = {"request_id", "model", "sampling", "response", "options"}
SERVED = {  # message -> its fields that are read; any other field that is set is refused
    "GenerateRequest": {*CALL, "text", "token_ids"},
    "ChatRequest": {*CALL, *CONVERSATION},
    "Conversation": CONVERSATION,
    "ChatMessage": {"role", "content", "tool_calls", "tool_call_id", "name", "content_parts"},
    "ToolCall": {"id", "name", "arguments_json"},
    "ContentPart": {"text"},
    "SamplingParams": {*SAMPLING, *LISTS, "logit_bias"},
    "ResponseOptions": set(RESPONSE),
    "RequestOptions": {"cache_salt", "priority", "sparse"},
    "Sparse": {"budget_tokens", "min_context", "min_context_tokens", "layers_dense"},
    "TokenIds": {"ids"},
    "Prompt": {"text", "token_ids"},
    "EmbedRequest": {"request_id", "model", "inputs", "pooling", "normalize", "options"},
    "ScoreRequest": {
        "request_id", "model", "prompt", "continuations", "logprobs", "prompt_logprobs", "options",
    },
    "TokenizeRequest": {"model", "text", "chat", "add_special_tokens", "return_tokens"},
}  # fmt: skip
USAGE = tuple(pb.Usage.DESCRIPTOR.fields_by_name)  # the engine's has the same names
REASONS = {
    FinishReason.STOP: pb.Finish.REASON_STOP,
    FinishReason.LENGTH: pb.Finish.REASON_LENGTH,
}
PLACES_AT_ONCE = 256  # of 20 logprobs each they take four milliseconds

POOLING = {pb.EmbedRequest.POOLING_MEAN: Pooling.MEAN, pb.EmbedRequest.POOLING_LAST: Pooling.LAST}

Request = pb.GenerateRequest | pb.ChatRequest
Call = Request | pb.EmbedRequest | pb.ScoreRequest


def optional(message: Any, name: str) -> Any:
    """A field's value; None if it is unset."""
    return getattr(message, name) if message.HasField(name) else None


def refuse_unserved(message: Any, at: str = "") -> None:
    """Raise Unimplemented naming the first field that is set and not served, however deep."""
    served = SERVED[message.DESCRIPTOR.name]
    for field, value in message.ListFields():
        if field.name not in served:
            raise Unimplemented(f"{at}{field.name} is not served by this version")
        if field.message_type is None or field.message_type.GetOptions().map_entry:
            continue
        for one in value if field.is_repeated else (value,):
            refuse_unserved(one, f"{at}{field.name}.")


def sampling_params(request: Request) -> SamplingParams:
    """What the caller set; unset fields stay unset. `refuse_unserved` has seen the request."""
    found: dict[str, Any] = {}
    for part in (request.sampling, request.response):
        for field, value in part.ListFields():  # those that are set: far fewer than there are
            found[field.name] = list(value) if field.name in LISTS else value
    if "logit_bias" in found:
        found["logit_bias"] = dict(found["logit_bias"])
    if request.options.HasField("sparse"):
        sparse = request.options.sparse
        context, earlier = (optional(sparse, n) for n in ("min_context", "min_context_tokens"))
        if context is not None and earlier is not None:
            raise InvalidRequest(
                "sparse.min_context_tokens must not be set beside sparse.min_context"
            )
        found["sparse"] = SparseParams(
            optional(sparse, "budget_tokens"),
            earlier if context is None else context,
            list(sparse.layers_dense),
        )
    return SamplingParams(**found)


def conversation(request: pb.ChatRequest | pb.Conversation) -> Conversation:
    """The conversation."""
    return Conversation(
        messages=[_chat_message(message) for message in request.messages],
        add_generation_prompt=optional(request, "add_generation_prompt"),
        continue_final_message=request.continue_final_message,
        variables=request.template_variables,
    )


def _chat_message(message: pb.ChatMessage) -> ChatMessage:
    has_content = message.HasField("content") or message.content_parts
    return ChatMessage(
        role=message.role,
        content=content_of(message) if has_content else None,
        tool_calls=[
            ToolCall(optional(call, "id"), call.name, call.arguments_json)
            for call in message.tool_calls
        ],
        tool_call_id=optional(message, "tool_call_id"),
        name=optional(message, "name"),
    )


def content_of(message: pb.ChatMessage) -> str:
    """The text of a turn, wherever it stands."""
    if not message.content_parts:
        return message.content
    if message.HasField("content"):
        raise InvalidRequest("content and content_parts must not both be set in a message")
    for part in message.content_parts:
        if part.WhichOneof("part") is None:
            raise InvalidRequest("content_parts must hold parts that are set: text")
    return "".join(part.text for part in message.content_parts)


async def response(event: TextEvent) -> pb.GenerateResponse:
    """One message of a stream. Others have their turn while it is made, as in all that may hold 640,000 logprobs."""
    message = pb.GenerateResponse(
        request_id=event.request_id,
        index=event.index,
        text=event.text,
        token_ids=event.token_ids,
        finish=None if event.finish is None else _finish(event),
    )
    if event.logprobs:
        await _extend(message.logprobs, event.logprobs)
    if event.prompt_logprobs:
        await _extend(message.prompt_logprobs, event.prompt_logprobs)
    return message


async def unary_response(request_id: str, events: Sequence[TextEvent]) -> pb.GenerateUnaryResponse:
    """All events of a request in one message."""
    message = pb.GenerateUnaryResponse(request_id=request_id)
    of_reply: dict[int, list[TextEvent]] = {}
    for event in events:
        of_reply.setdefault(event.index, []).append(event)
        await _extend(message.prompt_logprobs, event.prompt_logprobs)
    for index, parts in sorted(of_reply.items()):
        await asyncio.sleep(0)
        reply = message.replies.add(
            index=index,
            text="".join(event.text for event in parts),
            token_ids=[token for event in parts for token in event.token_ids],
            finish=_finish(parts[-1]),
        )
        await _extend(reply.logprobs, [place for event in parts for place in event.logprobs])
    return message


def embed_response(request_id: str, found: Sequence[Embedding]) -> pb.EmbedResponse:
    """One embedding an input."""
    return pb.EmbedResponse(
        request_id=request_id,
        embeddings=[
            pb.Embedding(values=one.values, prompt_tokens=one.usage.prompt_tokens) for one in found
        ],
    )


async def score_response(
    request_id: str,
    scores: Sequence[Score],
    *,
    prompt_tokens: int,
    prompt_logprobs: Sequence[TokenLogprobs | None],
    shows_places: bool,
) -> pb.ScoreResponse:
    """One score a continuation."""
    message = pb.ScoreResponse(request_id=request_id, prompt_tokens=prompt_tokens)
    for one in scores:
        score = message.scores.add(
            sum_logprob=one.sum_logprob,
            mean_logprob=one.mean_logprob,
            token_ids=[place.token_id for place in one.places],
        )
        if shows_places:
            await _extend(score.logprobs, one.places)
    await _extend(message.prompt_logprobs, prompt_logprobs)
    return message


def model_info(
    name: str, info: EngineInfo, defaults: GenerationDefaults, *, has_chat_template: bool
) -> pb.GetModelInfoResponse:
    """What is served."""
    return pb.GetModelInfoResponse(
        name=name,
        architecture=info.architecture,
        num_parameters=info.num_parameters,
        vocab_size=info.vocab_size,
        max_context_tokens=info.max_context_tokens,
        eos_token_ids=info.eos_token_ids,
        has_chat_template=has_chat_template,
        weight_dtype=info.dtype,
        default_sampling=pb.SamplingParams(
            temperature=1.0 if defaults.temperature is None else defaults.temperature,
            top_p=1.0 if defaults.top_p is None else defaults.top_p,
            top_k=defaults.top_k or 0,
            min_p=defaults.min_p or 0.0,
            repetition_penalty=defaults.repetition_penalty or 1.0,
        ),
    )


def server_info(
    info: EngineInfo, *, version: str, uptime_s: float, models: Sequence[str]
) -> pb.GetServerInfoResponse:
    """How it is served, and what else is."""
    return pb.GetServerInfoResponse(
        version=version,
        uptime_s=uptime_s,
        load_s=info.load_s,
        backend=info.backend,
        threads=info.threads,
        block_tokens=info.block_tokens,
        num_blocks=info.num_blocks,
        kv_dtype=info.kv_dtype,
        kv_bytes=info.kv_bytes,
        max_running=info.max_running,
        max_waiting=info.max_waiting,
        models=models,
    )


def loads(loads: Loads) -> pb.GetLoadsResponse:
    """How busy it is; the two have the same names."""
    names = pb.GetLoadsResponse.DESCRIPTOR.fields_by_name
    values = {name: getattr(loads, name) for name in names}
    values["expert_loads"] = [pb.ExpertLoads(num_tokens=layer) for layer in loads.expert_loads]
    return pb.GetLoadsResponse(**values)


def _finish(event: TextEvent) -> pb.Finish:
    assert event.finish is not None and event.usage is not None
    finish = pb.Finish(reason=REASONS[event.finish], usage=_usage(event.usage))
    if isinstance(event.stop, int):
        finish.stop_token_id = event.stop
    elif event.stop is not None:
        finish.stop_string = event.stop
    return finish


async def _extend(field: Any, places: Sequence[TokenLogprobs | None]) -> None:
    """Put places into a message, some at a time."""
    for start in range(0, len(places), PLACES_AT_ONCE):
        if start:
            await asyncio.sleep(0)
        field.extend(map(_place, places[start : start + PLACES_AT_ONCE]))


def _place(place: TokenLogprobs | None) -> pb.TokenLogprobs:
    if place is None:
        return pb.TokenLogprobs()
    return pb.TokenLogprobs(
        token_id=place.token_id,
        logprob=place.logprob,
        rank=place.rank,
        top=[pb.TopLogprob(token_id=token, logprob=logprob) for token, logprob in place.top],
    )


def _usage(usage: Usage) -> pb.Usage:
    return pb.Usage(**{name: getattr(usage, name) for name in USAGE})
