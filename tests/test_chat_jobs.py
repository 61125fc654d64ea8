"""Chats on the wire: what a job may say, and what is wrong with one that says something else."""

import json

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingine.contract.chat import ChatFields
from ingine.contract.jobs import Job, decode_job, encode_job
from ingine.errors import ErrorCode, InvalidJob
from ingine.producer.submission import build_submission

USER = {"role": "user", "content": "Hi"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
PARAMETERS = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
TOOL = {"type": "function", "function": {"parameters": PARAMETERS, "name": "f", "description": "d"}}
FULL_CHAT = {
    "id": "a",
    "messages": [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}], "name": "Jo"},
        {"role": "assistant", "tool_calls": [CALL], "reasoning": "Hm"},
        {"role": "tool", "tool_call_id": "call_1", "content": "1"},
        {"role": "assistant", "content": "So", "reasoning_content": "Hm"},
    ],
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": False,
    "chat_template_kwargs": {"enable_thinking": False, "documents": [{"title": "t"}]},
    "add_generation_prompt": False,
    "continue_final_message": True,
    "allow_special_tokens": True,
}


def chat(**fields) -> bytes:
    return msgpack.packb({"id": "a", "messages": [USER]} | fields)


def saying(*messages: dict) -> bytes:
    return chat(messages=list(messages))


def test_a_full_chat_comes_back_as_it_went():
    job = decode_job(msgpack.packb(FULL_CHAT))
    assert FULL_CHAT.keys() - {"id"} == ChatFields.model_fields.keys()
    assert decode_job(encode_job(job)) == job
    assert msgpack.unpackb(encode_job(job)) == {"v": 1, **FULL_CHAT}


def test_keys_of_tools_and_arguments_keep_their_order():
    """It shows in the prompt."""
    arguments = {"z": 1, "a": {"y": 2, "b": 3}}
    call = {"function": {"arguments": arguments, "name": "f"}, "type": "function", "id": "1"}
    raw = chat(tools=[TOOL], messages=[USER, CALLING | {"tool_calls": [call]}])
    sent = msgpack.unpackb(encode_job(decode_job(raw)))
    assert json.dumps(sent["tools"]) == json.dumps([TOOL])
    assert json.dumps(sent["messages"][1]["tool_calls"]) == json.dumps([call])


def test_what_is_not_set_is_not_sent():
    job = decode_job(chat(tools=None, tool_choice=None, parallel_tool_calls=True, allow_special_tokens=False))
    assert msgpack.unpackb(encode_job(job)) == {"v": 1, "id": "a", "messages": [USER]}


INVALID = {
    "no content": (saying({"role": "user"}), "invalid_shape", "`messages.0.content` is missing"),
    "content without a value": (saying(USER | {"content": None}), "invalid_shape", "`messages.0.content`"),
    "content of a number": (saying(USER | {"content": 5}), "invalid_type", "`messages.0.content` must be"),
    "an image": (
        saying(USER | {"content": [{"type": "image_url", "image_url": "x"}]}),
        "invalid_parameter",
        "`messages.0.content.0.type` must be 'text'",
    ),
    "a part without text": (
        saying(USER | {"content": [{"type": "text"}]}),
        "invalid_shape",
        "`messages.0.content.0.text` is missing",
    ),
    "nested parts": (
        saying(USER | {"content": [{"type": "text", "text": [{"type": "text", "text": "x"}]}]}),
        "invalid_type",
        "`messages.0.content.0.text` must be a string",
    ),
    "64 levels of parts": (
        saying(USER | {"content": json.loads("[" * 64 + "]" * 64)}),
        "nested_too_deep",
        "16 levels",
    ),
    "an unknown field": (saying(USER | {"audio": 1}), "unknown_field", "`messages.0.audio`"),
    "calls that are none": (
        saying(CALLING | {"tool_calls": [5]}),
        "invalid_type",
        "`messages.0.tool_calls.0` must be a map",
    ),
    "arguments that are no JSON": (
        saying(CALLING | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": '{"a": '}}]}),
        "invalid_parameter",
        "`messages.0.tool_calls.0.function.arguments`: must be a JSON object",
    ),
    "arguments that are a list": (
        saying(CALLING | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": "[1]"}}]}),
        "invalid_parameter",
        "must be a JSON object",
    ),
    "arguments nested to exhaust the stack": (
        saying(CALLING | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": "[" * 100_000}}]}),
        "invalid_parameter",
        "must be a JSON object",
    ),
    "arguments with bytes": (
        saying(CALLING | {"tool_calls": [CALL | {"function": {"name": "f", "arguments": {"a": b"x"}}}]}),
        "invalid_parameter",
        "must be JSON",
    ),
    "tools that are none": (chat(tools={"f": 1}), "invalid_type", "`tools` must be a list"),
    "a tool without a name": (
        chat(tools=[{"type": "function", "function": {}}]),
        "invalid_shape",
        "`tools.0.function.name` is missing",
    ),
    "a tool of another type": (
        chat(tools=[TOOL | {"type": "web_search"}]),
        "invalid_parameter",
        "`tools.0.type` must be 'function'",
    ),
    "a name with a space": (
        chat(tools=[{"type": "function", "function": {"name": "a b"}}]),
        "invalid_parameter",
        "`tools.0.function.name`",
    ),
    "two tools of one name": (chat(tools=[TOOL, TOOL]), "invalid_shape", "two tools have the same name"),
    "a schema with bytes": (
        chat(tools=[{"type": "function", "function": {"name": "f", "parameters": {"a": b""}}}]),
        "invalid_parameter",
        "`tools.0.function.parameters`: must be JSON",
    ),
    "a schema of 10,000 properties": (
        chat(
            tools=[
                {
                    "type": "function",
                    "function": {"name": "f", "parameters": {str(i): 0 for i in range(10_000)}},
                }
            ]
        ),
        "invalid_shape",
        "a map of 10000 entries",
    ),
    "a choice that there is not": (
        chat(tool_choice="any"),
        "invalid_parameter",
        "`tool_choice` must be 'none'",
    ),
    "a choice of a number": (chat(tool_choice=1), "invalid_type", "`tool_choice` must be"),
    "required without tools": (chat(tool_choice="required"), "invalid_shape", "tool_choice needs `tools`"),
    "a choice of an unknown function": (
        chat(tools=[TOOL], tool_choice={"type": "function", "function": {"name": "g"}}),
        "invalid_shape",
        "names 'g', a function that is not among the tools",
    ),
    "a reserved variable": (
        chat(chat_template_kwargs={"messages": []}),
        "invalid_parameter",
        "`chat_template_kwargs`: messages cannot be set here",
    ),
    "a variable that is no JSON": (
        chat(chat_template_kwargs={"x": float("nan")}),
        "invalid_parameter",
        "`chat_template_kwargs`: must be JSON",
    ),
    "a variable without a name": (chat(chat_template_kwargs={1: 2}), "invalid_type", "must be a string"),
    "continued and begun": (
        chat(continue_final_message=True),
        "invalid_shape",
        "continue_final_message needs add_generation_prompt=false",
    ),
    "tools for a prompt": (
        msgpack.packb({"id": "a", "prompt": "x", "tools": [TOOL]}),
        "invalid_shape",
        "tools needs `messages`",
    ),
}


@pytest.mark.parametrize("name", INVALID)
def test_what_is_wrong_has_a_code_and_names_the_field(name):
    raw, code, says = INVALID[name]
    with pytest.raises(InvalidJob) as refusal:
        decode_job(raw)
    assert refusal.value.code == ErrorCode(code)
    assert says in str(refusal.value)
    assert refusal.value.job_id == "a"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@given(
    text=st.text(max_size=10),
    arguments=st.dictionaries(st.text(max_size=5), json_values, max_size=3),
    parameters=st.none() | st.dictionaries(st.text(max_size=5), json_values, max_size=3),
    variables=st.none() | st.dictionaries(st.sampled_from(["a", "tool_x"]), json_values, max_size=2),
)
def test_any_valid_chat_comes_back_as_it_went(text, arguments, parameters, variables):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    job = Job(
        id="a",
        messages=[USER | {"content": text}, CALLING | {"tool_calls": [call]}],
        tools=[{"type": "function", "function": {"name": "f", "parameters": parameters}}],
        chat_template_kwargs=variables,
    )
    assert decode_job(encode_job(job)) == job


def test_a_client_sends_all_of_it():
    fields = {name: value for name, value in FULL_CHAT.items() if name != "id"}
    submission = build_submission(**fields)
    sent = msgpack.unpackb(submission.raw)
    assert {name: sent[name] for name in fields} == fields


def test_the_cost_counts_tools_and_calls():
    plain = build_submission(messages=[USER], max_tokens=1).cost
    assert build_submission(messages=[USER], max_tokens=1, tools=[TOOL]).cost > plain
    assert build_submission(messages=[USER, CALLING], max_tokens=1).cost > plain
    parts = [{"type": "text", "text": "Hi"}]
    assert build_submission(messages=[USER | {"content": parts}], max_tokens=1).cost == plain
