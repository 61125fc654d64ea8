"""Which format a model writes, and what a schema makes of a value that is written as text."""

import json

import pytest

from ingine.engine.parsers.choice import ModelFormats, checked_formats, formats_of
from ingine.engine.parsers.functions import types_of
from ingine.engine.parsers.message_parser import functions_of
from ingine.engine.parsers.qwen3_coder import as_json
from ingine.errors import ConfigError


@pytest.mark.parametrize(
    ("schema", "types"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": ["integer", "null"]}, {"integer", "null"}),
        ({"anyOf": [{"type": "array"}, {"type": "null"}]}, {"array", "null"}),
        ({"enum": ["a", 1]}, {"string", "integer"}),
        ({"anyOf": [{"$ref": "#/x"}, {"type": "null"}]}, set()),
        ({"oneOf": 5}, set()),
        ({}, set()),
        ("nonsense", set()),
    ],
)
def test_types_that_a_schema_names(schema, types):
    assert types_of(schema) == types


@pytest.mark.parametrize(
    ("text", "types", "expected"),
    [
        (" 7 ", {"integer"}, "7"),
        ("7.5", {"integer"}, '"7.5"'),
        ("7", {"number"}, "7"),
        ("1e400", {"number"}, "1e400"),
        ("NaN", {"number"}, '"NaN"'),
        ("True", {"boolean"}, "true"),
        ("None", {"object"}, "null"),
        ('{"a":  1}', {"object"}, '{"a":  1}'),
        ("{'a': 1}", {"object"}, "\"{'a': 1}\""),
        ('"a"', set(), r'"\"a\""'),
        ("[1", set(), '"[1"'),
        ("[" * 100_000, {"array"}, json.dumps("[" * 100_000)),
        ("9" * 5000, {"integer"}, json.dumps("9" * 5000)),
    ],
)
def test_values_of_other_types(text, types, expected):
    assert as_json(text, types) == expected


@pytest.mark.parametrize(
    ("model_type", "template", "expected"),
    [
        ("qwen2", "{{ '<tool_call>' }}", ModelFormats("hermes", None)),
        ("qwen3", "<tool_call> </think>", ModelFormats("hermes", "think")),
        ("qwen3_moe", "<tool_call>\n<function=\n<parameter=", ModelFormats("qwen3_coder", None)),
        ("mistral", "[TOOL_CALLS]", ModelFormats("mistral", None)),
        ("mistral3", "[TOOL_CALLS] [THINK]", ModelFormats("mistral", "mistral")),
        ("llama", '<|start_header_id|> "parameters"', ModelFormats("llama3_json", None)),
        ("llama", "<|im_start|>", ModelFormats("generic", None)),
        ("qwen2", None, ModelFormats("hermes", None)),
        ("qwen2", "{{ messages }} </think>", ModelFormats("hermes", "think")),
    ],
)
def test_formats_by_model(model_type, template, expected):
    assert formats_of(model_type, template) == expected


def test_formats_by_name():
    assert checked_formats("mistral", "think") == ModelFormats("mistral", "think")
    with pytest.raises(ConfigError, match="no tool format 'xml': there are generic, hermes"):
        checked_formats("xml", None)
    with pytest.raises(ConfigError, match="no reasoning format 'r1': there are mistral, think"):
        checked_formats("hermes", "r1")


def test_functions_of_tools():
    schema = {"type": "object"}
    tools = [
        {"type": "function", "function": {"name": "a", "parameters": schema}},
        {"type": "function", "function": {"name": "b"}},
    ]
    assert functions_of(tools) == {"a": schema, "b": {}}
