"""A checkpoint's chat template, run in a sandbox that can read its arguments and nothing else."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vivace.engine.errors import ArtifactError, InvalidRequest

# Marks what a model is trained on; at inference it only groups. `{% if true %}` does the same and is known to Jinja.
GENERATION = re.compile(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})")
END_GENERATION = re.compile(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})")


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn. Which roles there are is the template's decision."""

    role: str
    content: str


TEMPLATE_ERRORS = (  # what Jinja raises, and what the expressions in a template can
    TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    RecursionError,
    TypeError,
    ValueError,
)


class ChatTemplate:
    """Compiled once. `variables` are what templates expect beside the messages: bos_token and the like."""

    def __init__(self, source: str, variables: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        plain = END_GENERATION.sub(r"\1endif\2", GENERATION.sub(r"\1if true\2", source))
        try:
            self._template = environment.from_string(plain)
        except TemplateError as error:
            raise ArtifactError(f"chat template: {error}") from error
        self._variables = dict(variables)

    def render(self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool) -> str:
        """The conversation as the model knows it. Raises InvalidRequest with the template's own complaint."""
        try:
            return self._template.render(
                messages=[asdict(message) for message in messages],
                add_generation_prompt=add_generation_prompt,
                tools=None,  # defined, as transformers has them: templates test `is not none`
                documents=None,
                **self._variables,
            )
        except TEMPLATE_ERRORS as error:
            raise InvalidRequest(f"messages: the chat template says: {error}") from error


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    *,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: no HTML escapes, and no ASCII escapes unless asked for."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)
