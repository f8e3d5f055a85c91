"""Protobuf to the engine's words and back. Refuses what is not served, by name; checks no values."""

from typing import Any

from vivace.engine.chat_template import ChatMessage
from vivace.engine.completion import TextEvent
from vivace.engine.errors import Unimplemented
from vivace.engine.events import EngineInfo, FinishReason, Loads, TokenLogprobs, Usage
from vivace.engine.sampling import GenerationDefaults, SamplingParams
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb

SAMPLING = (
    "temperature", "top_p", "top_k", "min_p", "seed", "max_tokens", "min_tokens", "ignore_eos", "n",
    "best_of", "presence_penalty", "frequency_penalty", "repetition_penalty",
)  # fmt: skip
RESPONSE = ("logprobs", "prompt_logprobs", "include_stop_str_in_output", "skip_special_tokens")
LISTS = ("stop", "stop_token_ids", "logit_bias", "allowed_token_ids", "bad_words")
SERVED = {  # message -> its fields that are read; any other field that is set is refused
    "GenerateRequest": {
        "request_id", "model", "text", "token_ids", "sampling", "response", "options",
    },
    "ChatRequest": {
        "request_id", "model", "messages", "sampling", "response", "options",
        "add_generation_prompt",
    },
    "ChatMessage": {"role", "content"},
    "SamplingParams": {*SAMPLING, *LISTS},
    "ResponseOptions": set(RESPONSE),
    "RequestOptions": {"cache_salt"},
    "TokenIds": {"ids"},
}  # fmt: skip
REASONS = {
    FinishReason.STOP: pb.Finish.REASON_STOP,
    FinishReason.LENGTH: pb.Finish.REASON_LENGTH,
}

Request = pb.GenerateRequest | pb.ChatRequest


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
    """What the caller set; unset fields stay unset."""
    sampling, response = request.sampling, request.response
    found: dict[str, Any] = {
        name: getattr(sampling, name) for name in SAMPLING if sampling.HasField(name)
    }
    found |= {name: getattr(response, name) for name in RESPONSE if response.HasField(name)}
    found |= {name: list(getattr(sampling, name)) for name in LISTS if getattr(sampling, name)}
    return SamplingParams(**found)


def chat_messages(request: pb.ChatRequest) -> list[ChatMessage]:
    """The conversation."""
    return [ChatMessage(message.role, message.content) for message in request.messages]


def response(event: TextEvent) -> pb.GenerateResponse:
    """One message of a stream."""
    message = pb.GenerateResponse(
        request_id=event.request_id,
        index=0,
        text=event.text,
        token_ids=event.token_ids,
        logprobs=map(_place, event.logprobs),
        prompt_logprobs=map(_place, event.prompt_logprobs),
    )
    if event.finish is not None:
        assert event.usage is not None
        finish = pb.Finish(reason=REASONS[event.finish], usage=_usage(event.usage))
        if isinstance(event.stop, int):
            finish.stop_token_id = event.stop
        elif event.stop is not None:
            finish.stop_string = event.stop
        message.finish.CopyFrom(finish)
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
        ),
    )


def server_info(info: EngineInfo, *, version: str, uptime_s: float) -> pb.GetServerInfoResponse:
    """How it is served."""
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
    )


def loads(loads: Loads) -> pb.GetLoadsResponse:
    """How busy it is; the two have the same names."""
    names = pb.GetLoadsResponse.DESCRIPTOR.fields_by_name
    return pb.GetLoadsResponse(**{name: getattr(loads, name) for name in names})


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
    names = pb.Usage.DESCRIPTOR.fields_by_name  # the two have the same names
    return pb.Usage(**{name: getattr(usage, name) for name in names})
