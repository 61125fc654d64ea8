"""Bodies of `/v1/responses` as bodies of chat completions."""

import pytest

from ingine.gateway.errors import Refused
from ingine.gateway.responses.request import chat_body

USER = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("given", "messages"),
    [
        ("hi", [USER]),
        ([USER], [USER]),
        ([{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]}], [USER]),
        (
            [
                USER,
                {"type": "reasoning", "id": "rs_1", "content": [{"type": "reasoning_text", "text": "hm"}]},
                {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
                {"type": "function_call_output", "call_id": "c1", "output": "7"},
            ],
            [
                USER,
                {
                    "role": "assistant",
                    "reasoning": "hm",
                    "content": "",
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}},
                        {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
                    ],
                },
                {"role": "tool", "tool_call_id": "c1", "content": "7"},
            ],
        ),
    ],
)  # fmt: skip
def test_inputs(given, messages):
    assert chat_body({"model": "m", "input": given}) == {"model": "m", "messages": messages}


def test_fields_that_have_other_names():
    body = {
        "model": "m",
        "input": "hi",
        "instructions": "be brief",
        "max_output_tokens": 5,
        "temperature": 0.5,
        "background": True,
        "store": False,
        "stream": True,
        "metadata": {"a": "b"},
        "truncation": "disabled",
        "previous_response_id": None,
        "include": ["reasoning.encrypted_content"],
        "tools": [{"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}],
        "tool_choice": {"type": "function", "name": "f"},
        "text": {
            "format": {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True}
        },
    }
    assert chat_body(body) == {
        "model": "m",
        "messages": [{"role": "system", "content": "be brief"}, USER],
        "max_tokens": 5,
        "temperature": 0.5,
        "tools": [
            {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}
        ],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": {"type": "object"}, "strict": True},
        },
    }


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": ["hi"]}, "input"),
        ({"input": [{"type": "web_search_call"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
        ({"instructions": ["x"]}, "instructions"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"include": ["file_search_call.results"]}, "include"),
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": ["f"]}, "tools"),
        ({"reasoning": {"effort": "high"}}, "reasoning"),
        ({"text": {"format": "json"}}, "text"),
        ({"text": {"no_such": 1}}, "text"),
        ({"n": 2}, "n"),
    ],
)
def test_what_is_refused_names_the_field(fields, param):
    with pytest.raises(Refused) as caught:
        chat_body({"model": "m", "input": "hi"} | fields)
    assert (caught.value.status, caught.value.param) == (400, param)
