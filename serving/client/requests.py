"""What a caller writes to protobuf. Knows which parameter stands where; what a value may be is the server's to say.

Messages may be written as OpenAI's API has them: `content` as parts, `tool_calls` with a `function`.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Literal, TypedDict, TypeVar

from google.protobuf.message import Message as ProtoMessage

from vivace.serving.protos.vivace.v1 import inference_pb2 as pb

Prompt = (
    str | Mapping[str, Sequence[int]] | Sequence[int]
)  # text, `{"prompt_token_ids": [...]}`, ids
Message = Mapping[str, Any] | tuple[str, str | Sequence[Mapping[str, Any]]]
BatchItem = (
    Prompt | Mapping[str, Any]
)  # a prompt; or "prompt" or "messages" with parameters of its own
Kind = TypeVar("Kind", bound=ProtoMessage)

PARTS = (
    "sampling",
    "response",
    "options",
)  # of a request; a parameter's name is in it or one of them
MEDIA = ("image_url", "audio_url", "video_url")


class Params(TypedDict, total=False):
    """Parameters of `generate`, `chat` and their kin: those that are served, by the proto's names. None: unset."""

    request_id: str | None
    model: str | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    max_tokens: int | None
    min_tokens: int | None
    stop: str | Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    n: int | None
    best_of: int | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logit_bias: Mapping[int, float] | None
    allowed_token_ids: Sequence[int] | None
    bad_token_ids: Sequence[int] | None
    logprobs: int | None
    prompt_logprobs: int | None
    prompt_logprobs_start: int | None
    include_stop_str_in_output: bool | None
    skip_special_tokens: bool | None
    echo: bool | None
    cache_salt: str | None
    priority: int | None
    sparse: Mapping[str, Any] | None  # fields of the proto's Sparse
    continue_final_message: bool | None  # this and what follows: of a conversation alone
    add_generation_prompt: bool | None
    template_variables: Mapping[str, str] | None


class EmbedParams(TypedDict, total=False):
    """Parameters of `embed`."""

    request_id: str | None
    model: str | None
    pooling: Literal["mean", "last"] | None
    normalize: bool | None
    cache_salt: str | None
    priority: int | None


class ScoreParams(TypedDict, total=False):
    """Parameters of `score`."""

    request_id: str | None
    model: str | None
    logprobs: int | None
    prompt_logprobs: int | None
    cache_salt: str | None
    priority: int | None


class TokenizeParams(TypedDict, total=False):
    """Parameters of `tokenize`."""

    model: str | None
    add_special_tokens: bool | None
    return_tokens: bool | None
    continue_final_message: bool | None  # this and what follows: of a conversation alone
    add_generation_prompt: bool | None
    template_variables: Mapping[str, str] | None


def generate_request(prompt: Prompt, params: Mapping[str, Any]) -> pb.GenerateRequest:
    """A prompt and its parameters."""
    return _with_params(pb.GenerateRequest(**_prompt(prompt)), params)


def chat_request(messages: Sequence[Message], params: Mapping[str, Any]) -> pb.ChatRequest:
    """A conversation and its parameters."""
    return _with_params(pb.ChatRequest(messages=map(_message, messages)), params)


def batch_item(item: BatchItem, params: Mapping[str, Any]) -> pb.BatchItem:
    """A request of a batch. Its own parameters go before those that all share."""
    if not isinstance(item, Mapping) or "prompt_token_ids" in item:
        return pb.BatchItem(generate=generate_request(item, params))
    own = dict(item)
    if "messages" in own:
        messages = own.pop("messages")
        return pb.BatchItem(chat=chat_request(messages, {**params, **own}))
    if "prompt" not in own:
        raise TypeError(f"an item needs a prompt or messages, got {sorted(own)}")
    prompt = own.pop("prompt")
    return pb.BatchItem(generate=generate_request(prompt, {**params, **own}))


def embed_request(inputs: str | Sequence[Prompt], params: Mapping[str, Any]) -> pb.EmbedRequest:
    """One text, or some texts or lists of token ids."""
    prompts = [inputs] if isinstance(inputs, str) else inputs
    pooling = params.get("pooling")
    if pooling is not None:
        params = {**params, "pooling": f"POOLING_{pooling.upper()}"}
    return _with_params(pb.EmbedRequest(inputs=map(_prompt, prompts)), params)


def score_request(
    prompt: Prompt, continuations: Sequence[Prompt], params: Mapping[str, Any]
) -> pb.ScoreRequest:
    """A prompt and what may follow it."""
    continuations = [continuations] if isinstance(continuations, str) else continuations
    request = pb.ScoreRequest(prompt=_prompt(prompt), continuations=map(_prompt, continuations))
    return _with_params(request, params)


def tokenize_request(
    source: str | Sequence[Message], params: Mapping[str, Any]
) -> pb.TokenizeRequest:
    """A text, or a conversation."""
    if isinstance(source, str):
        return _with_params(pb.TokenizeRequest(text=source), params, parts=())
    request = pb.TokenizeRequest(chat={"messages": map(_message, source)})
    return _with_params(request, params, parts=("chat",))


def _prompt(prompt: Prompt) -> dict[str, Any]:
    if isinstance(prompt, str):
        return {"text": prompt}
    ids = prompt["prompt_token_ids"] if isinstance(prompt, Mapping) else prompt
    return {"token_ids": pb.TokenIds(ids=ids)}  # an empty list of ids is not an unset prompt


def _message(message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        message = dict(zip(("role", "content"), message, strict=True))
    fields = {name: value for name, value in message.items() if value is not None}
    if not isinstance(fields.get("content", ""), str):
        fields["content_parts"] = [_content_part(part) for part in fields.pop("content")]
    if "tool_calls" in fields:
        fields["tool_calls"] = [_tool_call(call) for call in fields["tool_calls"]]
    return fields


def _content_part(part: Mapping[str, Any]) -> dict[str, str]:
    kind = _needed(part, "type", "a content part")
    if kind == "text":
        return {"text": _needed(part, "text", "a content part")}
    if kind not in MEDIA:
        raise ValueError(f"a content part's type must be text or one of {MEDIA}, got {kind!r}")
    value = _needed(part, kind, "a content part")
    return {kind: _needed(value, "url", kind) if isinstance(value, Mapping) else value}


def _tool_call(call: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(call, Mapping):
        raise TypeError(f"a tool call must be an object, got {call!r:.80}")
    if "function" not in call:
        return dict(call)
    function, of = call["function"], "a tool call's function"
    found = {
        "name": _needed(function, "name", of),
        "arguments_json": _needed(function, "arguments", of),
    }
    return found | ({"id": call["id"]} if "id" in call else {})


def _needed(value: Any, key: str, name: str) -> Any:
    """What an object has under a key. Raises TypeError or ValueError saying what is wrong."""
    if not isinstance(value, Mapping):
        raise TypeError(f"{name} must be an object, got {value!r:.80}")
    if key not in value:
        raise ValueError(f"{name} must have {key!r}, got {dict(value)!r:.80}")
    return value[key]


def _with_params(request: Kind, params: Mapping[str, Any], parts: tuple[str, ...] = PARTS) -> Kind:
    """Put each parameter where the proto has it. Raises TypeError for a name that it has nowhere, or a value of no use."""
    homes = _homes(request.DESCRIPTOR, parts)
    for name, value in params.items():
        if name not in homes:
            raise TypeError(f"unknown parameter {name!r}")
        if value is None:
            continue
        home: Any = getattr(request, homes[name]) if homes[name] else request
        if isinstance(value, str) and home.DESCRIPTOR.fields_by_name[name].is_repeated:
            value = [value]
        try:
            home.MergeFrom(type(home)(**{name: value}))
        except (TypeError, ValueError) as error:
            raise TypeError(f"{name}: {error}, got {value!r:.80}") from error
    return request


@cache
def _homes(descriptor: Any, parts: tuple[str, ...]) -> dict[str, str]:
    """Name of a parameter -> the part of the request that has it; "" is the request itself."""
    fields = descriptor.fields_by_name
    homes = {name: part for part in parts if part in fields for name in _names(fields[part])}
    return homes | dict.fromkeys(fields, "")


def _names(field: Any) -> list[str]:
    return list(field.message_type.fields_by_name)
