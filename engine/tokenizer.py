"""Text to ids and back, and the chat template. Keeps no state between calls; streaming is `completion.py`'s."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from vivace.engine.chat_template import ChatTemplate
from vivace.engine.conversation import Conversation, check, parse_variables, template_messages
from vivace.engine.errors import ArtifactError, FailedPrecondition, InvalidRequest

LONG_TEXT_CHARS = 1024  # about 2 ms: whoever has others to serve tokenizes longer ones in a thread
SPECIAL_TOKENS = (  # what templates may ask for by name
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


@dataclass(frozen=True, slots=True)
class TemplateSource:
    """A chat template as the checkpoint has it. `variables`: the special tokens that it may ask for by name."""

    text: str
    variables: Mapping[str, str]


class Tokenizer:
    """A checkpoint's tokenizer.json and what tokenizer_config.json says of chats."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, template: TemplateSource | None) -> None:
        self._tokenizer = tokenizer
        self._template = template
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = frozenset(one for one, token in added.items() if token.special)
        self._byte_tokens = _byte_tokens(tokenizer)

    @staticmethod
    def load(directory: Path) -> "Tokenizer":
        """Raises ArtifactError naming the file that is missing or broken."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ArtifactError(f"{path} is missing")
        try:
            tokenizer = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises the base class for a broken file
            raise ArtifactError(f"{path} cannot be read: {error}") from error
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return Tokenizer(tokenizer, _read_template(directory))

    @property
    def has_chat_template(self) -> bool:
        """Whether there is a template."""
        return self._template is not None

    @property
    def template(self) -> TemplateSource | None:
        """The chat template, not compiled."""
        return self._template

    @property
    def library(self) -> tokenizers.Tokenizer:
        """What does the work."""
        return self._tokenizer

    @property
    def special_ids(self) -> frozenset[int]:
        """Tokens that decoding leaves out where special ones are skipped."""
        return self._special_ids

    @property
    def byte_tokens(self) -> Mapping[int, bytes]:
        """Tokens that stand for one raw byte of UTF-8 (`<0xE0>`), as SentencePiece falls back to; empty if there are none."""
        return self._byte_tokens

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with the special tokens that the checkpoint puts around one, unless told not to.

        Raises InvalidRequest for half a surrogate pair, which is no text.
        """
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise InvalidRequest(f"prompt is no Unicode text: {error.reason}") from error
        options = {"add_special_tokens": add_special_tokens}
        if len(text) < LONG_TEXT_CHARS:
            ids: list[int] = self._tokenizer.encode(text, **options).ids
        else:  # a batch alone releases the GIL meanwhile
            ids = self._tokenizer.encode_batch_fast([text], **options)[0].ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids."""
        options = {"skip_special_tokens": skip_special_tokens}
        if len(token_ids) < LONG_TEXT_CHARS:
            text: str = self._tokenizer.decode(token_ids, **options)
        else:
            [text] = self._tokenizer.decode_batch([token_ids], **options)
        return text

    def token_text(self, token_id: int) -> str:
        """What one token shows when it stands alone."""
        return self.decode([token_id], skip_special_tokens=False)

    def render_chat(self, conversation: Conversation) -> str:
        """A conversation as text, special tokens included, in this process and without limits: for templates one trusts.

        Raises FailedPrecondition without a template, InvalidRequest if the template refuses the messages.
        """
        if self._template is None:
            raise FailedPrecondition("this checkpoint has no chat template; use Generate")
        check(conversation)
        return ChatTemplate(self._template.text, self._template.variables).render(
            template_messages(conversation, lambda role: str),
            opens_turn=conversation.opens_turn,
            continues_with="\ue000" if conversation.continue_final_message else None,
            variables=parse_variables(conversation.variables),
        )


def _byte_tokens(tokenizer: tokenizers.Tokenizer) -> dict[int, bytes]:
    names = ((bytes((byte,)), tokenizer.token_to_id(f"<0x{byte:02X}>")) for byte in range(256))
    found = {token_id: byte for byte, token_id in names if token_id is not None}
    letter = next((token_id for token_id, byte in found.items() if byte == b"A"), None)
    # Some vocabularies hold these names as plain text.
    is_raw = letter is not None and tokenizer.decode([letter]) == "A"
    return found if is_raw else {}


def _read_template(directory: Path) -> TemplateSource | None:
    path = directory / "tokenizer_config.json"
    settings = _read_json(path) if path.is_file() else {}
    source = settings.get("chat_template")
    try:
        if isinstance(source, list):  # several named ones
            source = {one["name"]: one["template"] for one in source}.get("default")
        variables = {name: _token(settings.get(name)) for name in SPECIAL_TOKENS}
    except (LookupError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be read: {error!r}") from error
    beside = directory / "chat_template.jinja"
    if beside.is_file():
        path, source = beside, _read_text(beside)
    if source is None:
        return None
    if not isinstance(source, str):
        raise ArtifactError(f"{path}: chat_template is not text")
    return TemplateSource(
        source, {name: text for name, text in variables.items() if text is not None}
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not UTF-8: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read_text(path))
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ArtifactError(f"{path} does not hold an object")
    return found


def _token(value: Any) -> str | None:
    """A token is written as text, or as an object with its content."""
    text = value["content"] if isinstance(value, dict) else value
    if not isinstance(text, str | None):
        raise TypeError(f"a token is text, got {text!r}")
    return text
