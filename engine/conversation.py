"""A conversation as callers give it, checked and turned into what chat templates take. Renders nothing."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from vivace.engine.errors import InvalidRequest

MAX_MESSAGES = 4096
MAX_ROLE_CHARS = 64
MAX_JSON_DEPTH = 64
MAX_VARIABLES = 64
MAX_VARIABLE_CHARS = 1 << 16
RESERVED = frozenset(  # what templates are given beside variables, and Jinja's own names
    (
        "messages", "tools", "tool_choice", "documents", "add_generation_prompt",
        "continue_final_message", "bos_token", "eos_token", "unk_token", "sep_token", "pad_token",
        "cls_token", "mask_token", "raise_exception", "strftime_now", "range", "dict", "lipsum",
        "cycler", "joiner", "namespace", "self", "loop", "super", "caller", "varargs", "kwargs",
    )
)  # fmt: skip

Rewrite = Callable[[str], str]  # of a text of a turn


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call that the model asked for. `arguments_json` is a JSON object."""

    id: str | None
    name: str
    arguments_json: str


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn. Which roles there are is the template's decision. None: not said; only a turn with calls needs no content."""

    role: str
    content: str | None
    tool_calls: Sequence[ToolCall] = ()
    tool_call_id: str | None = None
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Conversation:
    """What is rendered. `variables` are JSON texts by name; they are the caller's settings, and may hold control tokens."""

    messages: Sequence[ChatMessage]
    add_generation_prompt: bool | None = None  # None: unless continuing
    continue_final_message: bool = False
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def opens_turn(self) -> bool:
        """Whether the template opens the assistant's turn."""
        if self.add_generation_prompt is None:
            return not self.continue_final_message
        return self.add_generation_prompt


def check(conversation: Conversation) -> None:
    """Raise InvalidRequest naming the field that no template could do anything with."""
    messages = conversation.messages
    if not messages:
        raise InvalidRequest("messages must hold at least one message, got 0")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequest(
            f"messages must hold at most {MAX_MESSAGES} messages, got {len(messages)}"
        )
    for i, message in enumerate(messages):
        if not 1 <= len(message.role) <= MAX_ROLE_CHARS or not message.role.isprintable():
            raise InvalidRequest(
                f"messages[{i}].role must be 1..{MAX_ROLE_CHARS} printable characters, "
                f"got {message.role[:80]!r}"
            )
        if message.content is None and not message.tool_calls:
            raise InvalidRequest(f"messages[{i}].content must be set")
    if conversation.continue_final_message:
        last = messages[-1]
        if last.role != "assistant" or not last.content:
            raise InvalidRequest(
                "continue_final_message needs a last message of the assistant with content, "
                f"got role {last.role!r}"
            )
        if conversation.add_generation_prompt:
            raise InvalidRequest(
                "add_generation_prompt must not be true with continue_final_message, got true"
            )


def parse_variables(variables: Mapping[str, str]) -> dict[str, Any]:
    """The values of a template's variables. Raises InvalidRequest naming the one that is wrong."""
    if len(variables) > MAX_VARIABLES:
        raise InvalidRequest(
            f"template_variables must hold at most {MAX_VARIABLES} entries, got {len(variables)}"
        )
    if sum(map(len, variables.values())) > MAX_VARIABLE_CHARS:
        raise InvalidRequest(
            f"template_variables must hold at most {MAX_VARIABLE_CHARS} characters in all"
        )
    found = {}
    for name, text in variables.items():
        if name in RESERVED or name.startswith("_") or not name.isidentifier():
            raise InvalidRequest(
                f"template_variables: {name[:80]!r} is reserved, or no name that a template can have"
            )
        found[name] = _parse(text, f"template_variables[{name!r}]")
    return found


def template_messages(conversation: Conversation, rewrite: Callable[[str], Rewrite]) -> list[Any]:
    """Messages as templates written for transformers take them; `rewrite` of a role says what becomes of its texts."""
    return [_message(i, one, rewrite(one.role)) for i, one in enumerate(conversation.messages)]


def _message(index: int, message: ChatMessage, change: Rewrite) -> dict[str, Any]:
    # A turn of calls alone has empty content: templates that trim it would write "None" otherwise.
    found: dict[str, Any] = {"role": message.role, "content": change(message.content or "")}
    if message.name is not None:
        found["name"] = change(message.name)
    if message.tool_call_id is not None:
        found["tool_call_id"] = change(message.tool_call_id)
    if message.tool_calls:
        found["tool_calls"] = [
            _call(call, change, f"messages[{index}].tool_calls[{i}]")
            for i, call in enumerate(message.tool_calls)
        ]
    return found


def _call(call: ToolCall, change: Rewrite, at: str) -> dict[str, Any]:
    if not call.name:
        raise InvalidRequest(f"{at}.name must be set")
    arguments = _parse(call.arguments_json or "{}", f"{at}.arguments_json")
    if not isinstance(arguments, dict):
        raise InvalidRequest(f"{at}.arguments_json must be a JSON object")
    function = {"name": change(call.name), "arguments": _changed(arguments, change)}
    found: dict[str, Any] = {"type": "function", "function": function}
    return found if call.id is None else {"id": change(call.id), **found}


def _changed(value: Any, change: Rewrite) -> Any:
    """A JSON value with every text in it changed."""
    match value:
        case str():
            return change(value)
        case list():
            return [_changed(one, change) for one in value]
        case dict():
            return {change(key): _changed(one, change) for key, one in value.items()}
    return value


def _parse(text: str, name: str) -> Any:
    try:
        value = json.loads(text)
        json.dumps(value, allow_nan=False).encode()  # what cannot be written again is no JSON
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name} must be JSON, got {text[:80]!r}") from error
    if _is_deep(value):
        raise InvalidRequest(f"{name} must be nested at most {MAX_JSON_DEPTH} deep")
    return value


def _is_deep(value: Any) -> bool:
    """Whether it is nested deeper than allowed."""
    level = [value]
    for _ in range(MAX_JSON_DEPTH + 1):
        inner = [one for one in level if isinstance(one, (list, dict))]
        if not inner:
            return False
        level = [part for one in inner for part in (one.values() if isinstance(one, dict) else one)]
    return True
