"""The parameters of a generation as words: one table, for flags and for lines of JSON. Checks types; values are the server's
to judge.
"""

import json
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction, Namespace
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from vivace.engine.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter by the API's name. `is_list`: its flag may be repeated, once a value."""

    name: str
    kind: type  # int, float, bool, str; dict: token ids to numbers; object: fields of a message, in JSON
    about: str
    is_list: bool = False

    @property
    def flag(self) -> str:
        """Without the dashes; of a list in the singular."""
        name = self.name[:-1] if self.is_list and self.name.endswith("s") else self.name
        return name.replace("_", "-")


PARAMS = (
    Param("max_tokens", int, "most tokens to generate; default: up to the context"),
    Param("min_tokens", int, "fewest tokens before a stop"),
    Param("temperature", float, "0 takes the best token; default: the checkpoint's"),
    Param("top_p", float, "keep the best tokens that have this much of the probability"),
    Param("top_k", int, "keep so many of the best tokens; 0: all"),
    Param("min_p", float, "drop tokens under this share of the best one's probability"),
    Param("seed", int, "the same seed gives the same text"),
    Param("n", int, "replies to one prompt"),
    Param("best_of", int, "replies drawn, of which the n most probable are shown"),
    Param("presence_penalty", float, "off the logit of tokens that the reply has"),
    Param("frequency_penalty", float, "likewise, for each time that it has them"),
    Param("repetition_penalty", float, "over 1: makes tokens of prompt and reply less likely"),
    Param("logit_bias", dict, "add a number to a token's logit; may be repeated"),
    Param("allowed_token_ids", int, "draw no token but this; may be repeated", is_list=True),
    Param("bad_token_ids", int, "never draw this token; may be repeated", is_list=True),
    Param("stop", str, "end before this text; may be repeated", is_list=True),
    Param("stop_token_ids", int, "end at this token; may be repeated", is_list=True),
    Param("ignore_eos", bool, "go on past the checkpoint's end tokens"),
    Param("include_stop_str_in_output", bool, "show the stop string that ended the reply"),
    Param("skip_special_tokens", bool, "leave control tokens out of the text (default: true)"),
    Param("echo", bool, "show the prompt before the reply"),
    Param("logprobs", int, "tell logprobs of so many of the best tokens (in JSONL)"),
    Param("prompt_logprobs", int, "likewise of the prompt's places (in JSONL)"),
    Param("prompt_logprobs_start", int, "the first of those places, from 0"),
    Param("cache_salt", str, "share cached prefixes only with requests of the same salt"),
    Param("priority", int, "higher ones start first; default 0"),
    Param("sparse", object, 'decode on a part of long contexts, such as {"budget_tokens": 2048}'),
)
BY_NAME = {param.name: param for param in PARAMS}


def add_flags(parser: ArgumentParser, *, without: Collection[str] = ()) -> None:
    """One flag for each parameter."""
    for param in PARAMS:
        if param.name in without:
            continue
        words: dict[str, Any] = {"type": param.kind}
        if param.kind is bool:
            words = {"action": BooleanOptionalAction}
        elif param.kind is dict:
            words = {"action": "append", "type": _pair, "metavar": "ID=NUMBER"}
        elif param.kind is object:
            words = {"type": _object, "metavar": "JSON"}
        elif param.is_list:
            words["action"] = "append"
        parser.add_argument(f"--{param.flag}", dest=param.name, help=param.about, **words)


def from_flags(args: Namespace) -> dict[str, Any]:
    """The parameters that were given."""
    given = {name: getattr(args, name, None) for name in BY_NAME}
    if given["logit_bias"] is not None:
        given["logit_bias"] = dict(given["logit_bias"])
    return {name: value for name, value in given.items() if value is not None}


def from_json(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of a line; null is unset. Raises InvalidRequest for a name or type that is none."""
    found = {}
    for name, value in fields.items():
        if name not in BY_NAME:
            raise InvalidRequest(f"{name!r} is no parameter; there are {', '.join(BY_NAME)}")
        found[name] = None if value is None else _typed(BY_NAME[name], value)
    return found


def _typed(param: Param, value: Any) -> Any:
    if param.kind is dict:
        if not isinstance(value, dict):
            raise InvalidRequest(
                f"{param.name} must be an object, token id to number, got {value!r}"
            )
        try:
            return {int(token): float(bias) for token, bias in value.items()}
        except (TypeError, ValueError) as error:
            raise InvalidRequest(
                f"{param.name} must be token ids to numbers, got {value!r}"
            ) from error
    if param.kind is object:
        if not isinstance(value, dict):
            raise InvalidRequest(f"{param.name} must be an object, got {value!r}")
        return value
    is_list = param.is_list and isinstance(value, list)
    for one in value if is_list else (value,):
        kinds = (int, float) if param.kind is float else (param.kind,)
        if not isinstance(one, kinds) or (isinstance(one, bool) and param.kind is not bool):
            noun = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
            several = ", or a list of such" if param.is_list else ""
            raise InvalidRequest(f"{param.name} must be {noun[param.kind]}{several}, got {one!r}")
    return [value] if param.is_list and not is_list else value


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ArgumentTypeError(f"a JSON object, got {text!r}")
    return found


def _pair(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise ArgumentTypeError(f"a token's id = a number, got {text!r}") from None
