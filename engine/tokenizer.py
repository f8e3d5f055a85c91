"""Text to ids and back, and the chat template. Keeps no state between calls; streaming is `completion.py`'s."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from vivace.engine.chat_template import ChatMessage, ChatTemplate
from vivace.engine.errors import ArtifactError, FailedPrecondition, InvalidRequest

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class Tokenizer:
    """A checkpoint's tokenizer.json and what tokenizer_config.json says of chats."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, template: ChatTemplate | None) -> None:
        self._tokenizer = tokenizer
        self._template = template

    @staticmethod
    def load(directory: Path) -> "Tokenizer":
        """Raises ArtifactError naming the file that is missing or broken."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ArtifactError(f"{path} is missing")
        try:
            tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except (ValueError, UnicodeDecodeError) as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from error
        except Exception as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return Tokenizer(tokenizer, _read_template(directory))

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` can work."""
        return self._template is not None

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with the special tokens that the checkpoint puts around one, unless told not to."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def token_text(self, token_id: int) -> str:
        """What one token shows when it stands alone."""
        return self.decode([token_id], skip_special_tokens=False)

    def render_chat(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, special tokens included: encode it without adding any.

        Raises FailedPrecondition without a template, InvalidRequest if the template refuses the messages.
        """
        if self._template is None:
            raise FailedPrecondition("this checkpoint has no chat template; use Generate")
        if not messages:
            raise InvalidRequest("messages must hold at least one message, got 0")
        return self._template.render(messages, add_generation_prompt=add_generation_prompt)


def _read_template(directory: Path) -> ChatTemplate | None:
    path = directory / "tokenizer_config.json"
    settings = _read_json(path) if path.is_file() else {}
    source = settings.get("chat_template")
    beside = directory / "chat_template.jinja"
    if beside.is_file():
        source = beside.read_text(encoding="utf-8")
    if isinstance(source, list):  # several named ones
        source = {one["name"]: one["template"] for one in source}.get("default")
    if source is None:
        return None
    variables = {name: _token(settings.get(name)) for name in SPECIAL_TOKENS}
    return ChatTemplate(
        source, {name: text for name, text in variables.items() if text is not None}
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} does not hold an object")
    return found


def _token(value: Any) -> str | None:
    """A token is written as text, or as an object with its content."""
    text: str | None = value["content"] if isinstance(value, dict) else value
    return text
