"""A checkpoint's chat template, run in a sandbox that can read its arguments and nothing else."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vivace.engine.errors import ArtifactError, InvalidRequest


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn. Which roles there are is the template's decision."""

    role: str
    content: str


class ChatTemplate:
    """Compiled once. `variables` are what templates expect beside the messages: bos_token and the like."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ArtifactError(f"chat template: {error}") from error
        self._variables = dict(variables)

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> str:
        """The conversation as the model knows it. Raises InvalidRequest with the template's own complaint."""
        try:
            return self._template.render(
                messages=[asdict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                **self._variables,
            )
        except (TemplateError, TypeError, ValueError, KeyError, IndexError) as error:
            raise InvalidRequest(f"messages: the chat template says: {error}") from error


def _tojson(value: Any, indent: int | None = None) -> str:
    """As transformers has it: no HTML escapes, no ASCII escapes."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
