"""A checkpoint's chat template, run in a sandbox that can read its arguments and nothing else."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vivace.engine.errors import ArtifactError, FailedPrecondition, InvalidRequest

# Marks what a model is trained on; at inference it only groups. `{% if true %}` does the same and is known to Jinja.
GENERATION = re.compile(r"(\{%[-+]?\s*)generation(\s*[-+]?%\})")
END_GENERATION = re.compile(r"(\{%[-+]?\s*)endgeneration(\s*[-+]?%\})")


TEMPLATE_ERRORS = (  # what Jinja raises, and what the expressions in a template can
    TemplateError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    SyntaxError,  # of the Python that Jinja makes of a template: more nested blocks than that has
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
        except TEMPLATE_ERRORS as error:
            raise ArtifactError(f"chat template: {error}") from error
        self._variables = dict(variables)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        opens_turn: bool,
        continues_with: str | None = None,
        variables: Mapping[str, Any] | None = None,
        max_chars: int | None = None,
    ) -> str:
        """The conversation as the model knows it; messages as templates written for transformers take them.

        `continues_with`, a character that the messages do not hold, ends the text where the last message's content does.
        Raises InvalidRequest with the template's own complaint, FailedPrecondition where it writes more than `max_chars`.
        """
        if continues_with is not None:
            last = messages[-1]
            messages = [*messages[:-1], {**last, "content": f"{last['content']}{continues_with} "}]
        try:
            pieces = self._template.generate(
                messages=messages,
                add_generation_prompt=opens_turn,
                tools=None,  # defined, as transformers has them: templates test `is not none`
                documents=None,
                **self._variables,
                **(variables or {}),
            )
            text = "".join(pieces if max_chars is None else _limited(pieces, max_chars))
        except TEMPLATE_ERRORS as error:
            raise InvalidRequest(f"messages: the chat template says: {error}") from error
        return text if continues_with is None else _cut(text, continues_with)


def _limited(pieces: Iterable[str], max_chars: int) -> Iterator[str]:
    """The pieces, until they are too many."""
    count = 0
    for piece in pieces:
        count += len(piece)
        if count > max_chars:
            raise FailedPrecondition(
                f"the chat template wrote more than {max_chars} characters, which is the most"
            )
        yield piece


def _cut(text: str, end: str) -> str:
    """The text before the last `end`. A template that has trimmed the space behind it would have trimmed what is before."""
    place = text.rfind(end)
    if place < 0:
        raise InvalidRequest(
            "continue_final_message: the chat template does not write the last message whole"
        )
    before = text[:place]
    return before if text[place + 1 : place + 2] == " " else before.rstrip()


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
