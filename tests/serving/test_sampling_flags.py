"""The table of parameters: it is the API's, and words become values of its types."""

import argparse

import pytest

from vivace.engine.errors import InvalidRequest
from vivace.serving import convert
from vivace.serving.protos.vivace.v1 import inference_pb2 as pb
from vivace.serving.sampling_flags import BY_NAME, PARAMS, add_flags, from_flags, from_json

HOMES = ("SamplingParams", "ResponseOptions", "RequestOptions")


def fields():
    """Every parameter that a request has, by name."""
    messages = (pb.DESCRIPTOR.message_types_by_name[home] for home in HOMES)
    return {field.name: field for message in messages for field in message.fields}


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return from_flags(parser.parse_args(words))


def test_every_parameter_that_is_served_has_a_flag():
    served = {name for home in HOMES for name in convert.SERVED[home]}
    assert served <= BY_NAME.keys()
    assert len(BY_NAME) == len(PARAMS) == len({param.flag for param in PARAMS})


@pytest.mark.parametrize("param", PARAMS, ids=lambda param: param.name)
def test_a_parameter_is_a_field_of_its_type(param):
    field = fields()[param.name]
    is_map = field.message_type is not None
    assert is_map == (param.kind in (dict, object))
    if not is_map:
        kinds = {field.TYPE_INT64: int, field.TYPE_INT32: int, field.TYPE_DOUBLE: float}
        kinds |= {field.TYPE_BOOL: bool, field.TYPE_STRING: str}
        assert (kinds[field.type], field.is_repeated) == (param.kind, param.is_list)


@pytest.mark.parametrize("param", PARAMS, ids=lambda param: param.name)
def test_a_flag_and_a_line_give_the_same(param):
    word, value = {int: ("7", 7), float: ("0.5", 0.5), str: ("a b", "a b")}.get(
        param.kind, ("5=-1.5", {"5": -1.5})
    )
    if param.kind is object:
        word, value = '{"budget_tokens": 256, "layers_dense": [0]}', {"budget_tokens": 256}
        value |= {"layers_dense": [0]}
    if param.kind is bool:
        assert parsed(f"--{param.flag}") == from_json({param.name: True}) == {param.name: True}
        assert parsed(f"--no-{param.flag}") == from_json({param.name: False})
    elif param.is_list:
        words = (f"--{param.flag}", word, f"--{param.flag}", word)
        assert parsed(*words) == from_json({param.name: [value, value]})
        assert from_json({param.name: value}) == {param.name: [value]}
    else:
        assert parsed(f"--{param.flag}", word) == from_json({param.name: value})
    assert from_json({param.name: None}) == {param.name: None}


def test_nothing_is_given_where_nothing_was_said():
    assert parsed() == {}
    assert parsed("--logit-bias", "1=2", "--logit-bias", "3=4") == {"logit_bias": {1: 2.0, 3: 4.0}}


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ({"top_q": 1}, "'top_q' is no parameter; there are max_tokens, "),
        ({"max_tokens": 1.0}, r"max_tokens must be a whole number, got 1\.0"),
        ({"max_tokens": True}, "max_tokens must be a whole number, got True"),
        ({"temperature": "hot"}, "temperature must be a number, got 'hot'"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false, got 1"),
        ({"stop": [1]}, "stop must be a text, or a list of such, got 1"),
        ({"logit_bias": [1]}, "logit_bias must be an object"),
        ({"logit_bias": {"a": 1}}, "logit_bias must be token ids to numbers"),
        ({"logit_bias": {"1": None}}, "logit_bias must be token ids to numbers"),
        ({"sparse": 512}, "sparse must be an object, got 512"),
    ],
)
def test_a_wrong_value_is_refused_by_name(line, text):
    with pytest.raises(InvalidRequest, match=text):
        from_json(line)
