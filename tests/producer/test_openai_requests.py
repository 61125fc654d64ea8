"""What becomes of a body in OpenAI's format: tools, response formats, and messages of earlier responses."""

import json

import pytest

from ingine.producer import InvalidJob
from ingine.producer.submission import build_submission
from tests.producer.test_batch_format import CHAT, COMPLETIONS, HI, TOOL, parse

NAMED = {"type": "function", "function": {"name": "f"}}
SCHEMA = {"type": "object", "properties": {"ä": {"type": "integer"}, "a": {"type": "string"}}}


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": [TOOL], "tool_choice": NAMED},
        {"tools": [TOOL], "tool_choice": "none"},
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"add_generation_prompt": False, "continue_final_message": True},
    ],
    ids=str,
)
def test_fields_of_a_chat_are_those_of_the_job(fields: dict):
    arguments = parse({"messages": HI, "max_tokens": 5} | fields).arguments
    assert arguments == {"model": None, "messages": HI, "sampling": {"max_tokens": 5}} | fields
    build_submission(**arguments)


def test_no_tools_are_as_good_as_none():
    plain = parse({"messages": HI}).arguments
    assert parse({"messages": HI, "tools": []}).arguments == plain
    assert parse({"messages": HI, "tools": None, "tool_choice": None}).arguments == plain


@pytest.mark.parametrize("body", [{"messages": HI}, {"prompt": "hi"}], ids=["chat", "completion"])
@pytest.mark.parametrize(
    ("response_format", "expected"),
    [
        ({"type": "text"}, None),
        ({"type": "json_object"}, {"json_object": True}),
        (
            {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}},
            {"json": '{"type":"object","properties":{"ä":{"type":"integer"},"a":{"type":"string"}}}'},
        ),
        (
            {"type": "structural_tag", "structures": [{"begin": "<a>"}], "triggers": ["<"]},
            {"structural_tag": {"structures": [{"begin": "<a>"}], "triggers": ["<"]}},
        ),
    ],
    ids=["text", "json_object", "json_schema", "structural_tag"],
)
def test_a_response_format_is_what_constrains_the_output(body, response_format, expected):
    arguments = parse(body | {"response_format": response_format}, url_of(body)).arguments
    assert arguments["sampling"].get("structured_outputs") == expected
    job = build_submission(**arguments).job
    assert (job.sampling.structured_outputs is None) == (expected is None)


def url_of(body: dict) -> str:
    return CHAT if "messages" in body else COMPLETIONS


def test_a_schema_may_be_nested_deeper_than_a_job():
    schema: dict = {}
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    response_format = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    job = build_submission(**parse({"messages": HI, "response_format": response_format}).arguments).job
    assert json.loads(job.sampling.structured_outputs.json_schema) == schema


@pytest.mark.parametrize(
    ("response_format", "code"),
    [
        ("json_object", "invalid_parameter"),
        ({}, "invalid_parameter"),
        ({"type": "grammar", "grammar": "x"}, "invalid_parameter"),
        ({"type": "json_object", "schema": SCHEMA}, "unsupported_parameter"),
        ({"type": "json_schema"}, "invalid_parameter"),
        ({"type": "json_schema", "schema": SCHEMA}, "invalid_parameter"),
        ({"type": "json_schema", "json_schema": SCHEMA}, "invalid_parameter"),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": "{}"}}, "invalid_parameter"),
        ({"type": "json_schema", "json_schema": {"schema": {}, "strickt": 1}}, "unsupported_parameter"),
        ({"type": "json_schema", "json_schema": {"schema": {"maximum": float("nan")}}}, "invalid_parameter"),
    ],
    ids=str,
)
def test_a_wrong_response_format_is_refused(response_format, code):
    refusal = parse({"messages": HI, "response_format": response_format}).refusal
    assert (refusal.code, refusal.param) == (code, "response_format")
    assert "response_format" in str(refusal)


def test_an_output_has_one_constraint():
    fields = {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "x"}}
    assert parse({"messages": HI} | fields).refusal.param == "response_format"
    fields["response_format"] = {"type": "text"}
    sampling = parse({"messages": HI} | fields).arguments["sampling"]
    assert sampling == {"structured_outputs": {"regex": "x"}}


def test_messages_of_earlier_responses_are_accepted_as_they_were_returned():
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    nothing = {"refusal": None, "audio": None, "function_call": None, "annotations": []}
    calls = {"role": "assistant", "content": None, "tool_calls": [call]}
    text = {"role": "assistant", "content": "x", "reasoning": "y"}
    answer = {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "5"}]}
    line = parse({"messages": [*HI, calls | nothing, answer, text | {"tool_calls": None} | nothing, *HI]})
    assert line.arguments["messages"] == [
        *HI,
        {"role": "assistant", "tool_calls": [call]},
        answer | {"content": "5"},
        text,
        *HI,
    ]
    build_submission(**line.arguments)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools"),
        ({"tools": [{"function": {"name": "f"}}]}, "tools"),
        ({"tools": [TOOL, TOOL]}, "two tools"),
        ({"tools": "f"}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": NAMED}, "tool_choice"),
        ({"tool_choice": 5}, "tool_choice"),
        ({"parallel_tool_calls": "no"}, "parallel_tool_calls"),
        ({"n": 1000}, "n"),
        ({"logprobs": True, "top_logprobs": 21}, "logprobs"),
    ],
    ids=str,
)
def test_what_a_worker_would_refuse_is_refused_before_it_is_sent(fields, says):
    with pytest.raises(InvalidJob, match=says):
        build_submission(**parse({"messages": HI} | fields).arguments)
