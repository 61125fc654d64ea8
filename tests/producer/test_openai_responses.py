"""Bodies of responses have OpenAI's shape, field by field."""

from typing import Any

import pytest
from jsonschema import ValidationError

from ingine.contract.record import JobStatus
from ingine.message import Message, ToolCall
from ingine.producer import BadRecord, Choice, InvalidJob, JobFailed, Result
from ingine.producer.openai.requests import RequestRefused
from ingine.producer.openai.responses import chat_completion, error_response, text_completion
from tests.producer.openai_types import check_body

LOGPROBS = [
    {"token_id": 7, "logprob": -0.5, "top": [[7, -0.5]], "bytes": [104], "top_bytes": [[104]]},
    {"token_id": 8, "logprob": -2, "top": []},
]
CALLS = Message("", "hm", [ToolCall("call_1", "f", '{"a": 1')]).to_openai()
USAGE = {"num_prompt_tokens": 4, "num_output_tokens": 2, "num_cached_tokens": 1}
CHOICES = [
    Choice(0, "ab", [7, 8], "stop", "###", LOGPROBS),
    Choice(1, "<tool_call>", [9], "tool_calls", parsed=CALLS),
    Choice(2, "", [9], "length", parsed=Message().to_openai()),
]


def result(choices: list[Choice], **fields: Any) -> Result:
    return Result("j", "", [], "stop", USAGE, {}, None, JobStatus.FINISHED, choices=choices, **fields)


def test_a_chat_completion_has_openais_shape():
    body = chat_completion(result(CHOICES, prompt_logprobs=[None, *LOGPROBS]), model="m", created=5)
    check_body(body)
    assert (body["id"], body["object"], body["model"], body["created"]) == (
        *("chatcmpl-j", "chat.completion"),
        *("m", 5),
    )
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    assert [choice["finish_reason"] for choice in body["choices"]] == ["stop", "tool_calls", "length"]
    assert body["choices"][1]["message"] == {
        "role": "assistant",
        "content": None,
        "refusal": None,
        "reasoning": "hm",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1'}}
        ],
    }
    assert body["choices"][2]["message"]["content"] == ""
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 2,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 1},
    }
    assert len(body["choices"][0]["logprobs"]["content"]) == 2


def test_a_text_completion_has_openais_shape():
    found = result([CHOICES[0], Choice(1, "c", [9], "length")], prompt_logprobs=[None, *LOGPROBS])
    body = text_completion(found, model="m", created=5, prompt="Once ")
    check_body(body)
    assert [choice["text"] for choice in body["choices"]] == ["Once ab", "Once c"]
    assert body["choices"][0]["logprobs"]["tokens"] == ["h", "token_id:8"]
    assert body["choices"][1]["logprobs"] is None


def test_the_shape_is_checked():
    for change in ({"extra": 1}, {"model": None}, {"choices": [{}]}):
        with pytest.raises(ValidationError):
            check_body(chat_completion(result(CHOICES), model="m", created=5) | change)


def test_a_request_that_names_no_model_has_a_response_all_the_same():
    check_body(chat_completion(result(CHOICES), model=None, created=5))


@pytest.mark.parametrize(
    ("error", "status", "kind", "param"),
    [
        (RequestRefused("unsupported_parameter", "x", "stream"), 400, "invalid_request_error", "stream"),
        (InvalidJob("invalid_grammar", "x"), 400, "invalid_request_error", None),
        (JobFailed("x", code="prompt_too_long"), 400, "invalid_request_error", None),
        (JobFailed("x", code="engine_error"), 500, "server_error", None),
        (BadRecord("x"), 500, "server_error", None),
    ],
    ids=repr,
)
def test_an_error_has_a_status_and_openais_fields(error, status, kind, param):
    fields = {"message": "x", "type": kind, "param": param, "code": str(error.code)}
    assert error_response(error) == (status, {"error": fields})


def test_what_a_newer_worker_adds_is_left_out():
    """A body has known fields alone: others need not be JSON, since whoever writes the log can write them."""
    extra = {"more": b"\xff"}
    call = CALLS["tool_calls"][0] | {"function": CALLS["tool_calls"][0]["function"] | extra} | extra
    choice = Choice(0, "", [7], "tool_calls", parsed=CALLS | {"tool_calls": [call]} | extra)
    found = result([choice], prompt_logprobs=[None, LOGPROBS[0] | extra])
    body = chat_completion(found, model="m", created=5)
    check_body(body)
    assert body["choices"][0]["message"] == CALLS | {"refusal": None}
    assert body["prompt_logprobs"] == [None, LOGPROBS[0]]
    body = text_completion(found, model="m", created=5)
    assert body["choices"][0]["prompt_logprobs"] == [None, LOGPROBS[0]]
