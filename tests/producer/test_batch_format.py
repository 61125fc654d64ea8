"""OpenAI's Batch format: the jobs of lines, refusals by name, and the rows."""

import json

import pytest

from ingine.contract.record import JobStatus
from ingine.producer import Choice, InvalidJob, JobCancelled, JobExpired, JobFailed, Result
from ingine.producer.openai.batch_format import Line, error_row, output_row, parse_line
from ingine.producer.submission import build_submission

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
JSON_MODE = {"type": "json_object"}
AN_IMAGE = {"role": "user", "content": [{"type": "image_url"}]}
HI = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}


def parse(body: object, url: str = CHAT, **fields) -> Line:
    line = {"custom_id": "a", "method": "POST", "url": url, "body": body} | fields
    return parse_line(1, json.dumps(line).encode(), model=None, known_ids=set())


def result(**fields) -> Result:
    usage = {"num_prompt_tokens": 4, "num_output_tokens": 2, "num_cached_tokens": 1}
    defaults = {"job_id": "j", "text": "out", "token_ids": [7, 8], "finish_reason": "stop", "usage": usage}
    fields = defaults | {"timings": {}, "metadata": None, "status": JobStatus.FINISHED} | fields
    names = ("text", "token_ids", "finish_reason", "stop_reason", "logprobs")
    choice = {name: fields.get(name) for name in names}
    return Result(**{"choices": [Choice(0, **choice)]} | fields)


def test_a_chat_line_is_a_job():
    line = parse({"model": "m", "messages": HI, "max_tokens": 5})
    assert line.arguments == {"model": "m", "messages": HI, "sampling": {"max_tokens": 5}}


@pytest.mark.parametrize(
    ("prompt", "expected"), [("hi", "hi"), ([1, 2], [1, 2]), (["hi"], "hi"), ([[1, 2]], [1, 2])]
)
def test_a_completion_line_is_a_job(prompt, expected):
    assert parse({"prompt": prompt}, COMPLETIONS).arguments["prompt"] == expected


def test_text_parts_are_joined():
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    line = parse({"messages": [{"role": "user", "content": parts}]})
    assert line.arguments["messages"] == [{"role": "user", "content": "one two"}]


@pytest.mark.parametrize(
    ("body", "sampling"),
    [
        ({"max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"temperature": 0, "top_p": 0.5, "seed": 3},) * 2,
        ({"presence_penalty": 1, "frequency_penalty": -1},) * 2,
        ({"stop": "x"}, {"stop": "x"}),
        ({"stop": ["x", "y"]}, {"stop": ["x", "y"]}),
        ({"logit_bias": {"50": -100}}, {"logit_bias": {50: -100}}),
        ({"logprobs": True, "top_logprobs": 3}, {"logprobs": 3}),
        ({"logprobs": True}, {"logprobs": 0}),
        ({"logprobs": False}, {}),
        (
            {"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1},
            {"top_k": 4, "min_p": 0.1, "repetition_penalty": 1.1},
        ),
        ({"ignore_eos": True, "min_tokens": 2, "stop_token_ids": [1]},) * 2,
        ({"n": 3}, {"n": 3}),
        ({"n": 1, "stream": False, "tools": [], "response_format": {"type": "text"}, "user": "me"}, {}),
        ({"temperature": None, "tools": None}, {}),
        ({"max_tokens": None}, {}),
        ({"max_completion_tokens": 5, "max_tokens": 7}, {"max_tokens": 5}),
        ({"max_tokens": 7, "max_completion_tokens": 5}, {"max_tokens": 5}),
        ({"presence_penalty": 0, "frequency_penalty": 0}, {"presence_penalty": 0, "frequency_penalty": 0}),
        ({"logit_bias": None, "response_format": None, "seed": None}, {}),
        ({"store": False, "metadata": {"a": "b"}, "service_tier": "flex", "prompt_cache_key": "k"}, {}),
        ({"tool_choice": "auto", "parallel_tool_calls": True, "functions": []}, {}),
        ({"modalities": ["text"], "stream_options": None, "prediction": None, "audio": None}, {}),
        ({"use_beam_search": False, "best_of": 1, "extra_args": {}}, {}),
        ({"bad_words": ["x"], "allowed_token_ids": [1, 2]},) * 2,
        ({"skip_special_tokens": False, "include_stop_str_in_output": True},) * 2,
        ({"add_generation_prompt": True, "continue_final_message": False, "add_special_tokens": False}, {}),
        ({"return_token_ids": False, "chat_template_kwargs": {}, "priority": 0, "guided_json": None}, {}),
    ],
)
def test_parameters(body, sampling):
    arguments = parse({"messages": HI} | body).arguments
    assert arguments["sampling"] == sampling
    build_submission(**arguments)  # and a worker would accept it


@pytest.mark.parametrize(
    ("line", "code", "param"),
    [
        (parse({"messages": HI, "best_of": 2}), "unsupported_parameter", "best_of"),
        (parse({"messages": HI, "functions": [{"name": "f"}]}), "unsupported_parameter", "functions"),
        (
            parse({"messages": HI, "tool_choice": {"type": "allowed_tools"}}),
            "unsupported_parameter",
            "tool_choice",
        ),
        (parse({"prompt": "a", "tools": [TOOL]}, COMPLETIONS), "unsupported_parameter", "tools"),
        (parse({"messages": HI, "logprobs": 2}), "invalid_parameter", "logprobs"),
        (parse({"messages": HI, "stream": True}), "unsupported_parameter", "stream"),
        (parse({"messages": HI, "stream": 0}), "unsupported_parameter", "stream"),
        (parse({"messages": HI, "reasoning_effort": "high"}), "unsupported_parameter", "reasoning_effort"),
        (parse({"messages": HI, "add_special_tokens": True}), "unsupported_parameter", "add_special_tokens"),
        (parse({"messages": HI, "guided_json": {}}), "unsupported_parameter", "guided_json"),
        (parse({"messages": HI, "echo": True}), "unsupported_parameter", "echo"),
        (parse({"prompt": "a", "echo": 1}, COMPLETIONS), "invalid_parameter", "echo"),
        (parse({"prompt": [1], "echo": True}, COMPLETIONS), "unsupported_parameter", "echo"),
        (parse({"prompt": "a", "echo": True, "logprobs": 0}, COMPLETIONS), "unsupported_parameter", "echo"),
        (
            parse({"prompt": "a", "echo": True, "truncate_prompt_tokens": 2}, COMPLETIONS),
            "unsupported_parameter",
            "echo",
        ),
        (
            parse({"prompt": "a", "add_special_tokens": False}, COMPLETIONS),
            "unsupported_parameter",
            "add_special_tokens",
        ),
        (parse({"messages": HI, "max_tokenz": 1}), "unsupported_parameter", "max_tokenz"),
        (parse({"messages": HI, "top_logprobs": 2}), "invalid_parameter", "top_logprobs"),
        (parse({"messages": HI, "logprobs": False, "top_logprobs": 2}), "invalid_parameter", "top_logprobs"),
        (parse({"prompt": ["a", "b"]}, COMPLETIONS), "unsupported_parameter", "prompt"),
        (
            parse({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "unsupported_content",
            None,
        ),
        (parse({"messages": [{"role": "user", "content": None}]}), "invalid_messages", None),
        (parse({"messages": "hi"}), "invalid_messages", "messages"),
        (parse("hi"), "invalid_body", "body"),
        (parse({}, "/v1/embeddings"), "invalid_url", "url"),
        (parse({}, ["/v1/completions"]), "invalid_url", "url"),
        (parse({"messages": HI}, method="GET"), "invalid_method", "method"),
        (parse({"messages": HI}, custom_id=5), "missing_custom_id", "custom_id"),
        (parse({"messages": HI}, custom_id=""), "missing_custom_id", "custom_id"),
    ],
)
def test_what_we_cannot_do_is_refused_by_name(line: Line, code: str, param: str | None):
    assert line.refusal.code == code
    if param:
        assert line.refusal.param == param
        assert param in str(line.refusal)
    row = error_row(line, line.refusal)
    assert row["error"] is None
    assert row["response"]["status_code"] == 400
    assert row["response"]["body"]["error"]["code"] == code
    assert row["response"]["body"]["error"]["message"].startswith("line 1: ")


@pytest.mark.parametrize(
    "raw", [b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"[]", b"3", b"null", b"1" * 10_000], ids=repr
)
def test_a_line_that_is_no_object_is_refused_with_its_number(raw: bytes):
    line = parse_line(17, raw, model=None, known_ids=set())
    assert line.refusal.code in ("invalid_json", "invalid_line")
    assert str(line.refusal).startswith("line 17: ")
    assert error_row(line, line.refusal)["custom_id"] is None


def test_a_completion_line_may_say_what_is_so_anyway():
    body = {"prompt": "hi", "echo": False, "suffix": "", "add_special_tokens": True, "logprobs": 2, "n": 1}
    assert parse(body, COMPLETIONS).arguments["sampling"] == {"logprobs": 2}


def test_a_second_use_of_a_custom_id_is_refused():
    known: set[str] = set()
    raw = json.dumps({"custom_id": "a", "url": CHAT, "body": {"messages": HI}}).encode()
    first, second = (parse_line(number, raw, model=None, known_ids=known) for number in (1, 2))
    assert first.refusal is None
    assert second.refusal.code == "duplicate_custom_id"
    assert first.row_id != second.row_id


def test_a_line_is_known_again_by_what_it_asks_for():
    line = parse({"messages": HI, "max_tokens": 5, "seed": 1})
    assert parse({"seed": 1, "max_tokens": 5, "messages": HI}).digest == line.digest
    assert parse({"messages": HI, "max_tokens": 6, "seed": 1}).digest != line.digest
    assert parse({"messages": HI, "max_tokens": 5, "seed": 1}, custom_id="b").digest != line.digest
    raw = json.dumps({"custom_id": "a", "method": "POST", "url": CHAT, "body": {"messages": HI}}).encode()
    models = [parse_line(1, raw, model=model, known_ids=set()) for model in (None, "m")]
    assert models[0].digest != models[1].digest
    assert models[1].arguments["model"] == "m"


def test_the_row_of_a_chat():
    line = parse({"model": "m", "messages": HI})
    row = output_row(line, result())
    assert (row["id"], row["custom_id"], row["error"]) == (line.row_id, "a", None)
    assert row["response"]["status_code"] == 200
    body = row["response"]["body"]
    assert (body["object"], body["model"]) == ("chat.completion", "m")
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "out", "refusal": None}
    assert (choice["index"], choice["finish_reason"], choice["logprobs"]) == (0, "stop", None)
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 2,
        "total_tokens": 6,
        "prompt_tokens_details": {"cached_tokens": 1},
    }


def test_the_row_of_a_completion():
    body = output_row(parse({"prompt": "hi"}, COMPLETIONS), result())["response"]["body"]
    assert body["object"] == "text_completion"
    assert body["choices"][0]["text"] == "out"


def rows_with_logprobs(*logprobs: dict) -> tuple[dict, dict]:
    """`logprobs` of a chat's row and of a completion's, after a round trip through JSON."""
    lines = parse({"messages": HI}), parse({"prompt": "hi"}, COMPLETIONS)
    rows = (output_row(line, result(logprobs=[*logprobs])) for line in lines)
    chat, completion = (json.loads(json.dumps(row))["response"]["body"]["choices"][0] for row in rows)
    return chat["logprobs"], completion["logprobs"]


def test_logprobs_have_the_text_of_each_token():
    """The second token is half a character: its bytes say which."""
    chat, completion = rows_with_logprobs(
        {
            "token_id": 7,
            "logprob": -0.5,
            "top": [[7, -0.5], [9, -1.0]],
            "bytes": [32, 104, 105],
            "top_bytes": [[32, 104, 105], [60, 124, 62]],
        },
        {"token_id": 8, "logprob": -2.0, "top": [], "bytes": [195], "top_bytes": []},
    )
    assert chat == {
        "content": [
            {
                "token": " hi",
                "logprob": -0.5,
                "bytes": [32, 104, 105],
                "top_logprobs": [
                    {"token": " hi", "logprob": -0.5, "bytes": [32, 104, 105]},
                    {"token": "<|>", "logprob": -1.0, "bytes": [60, 124, 62]},
                ],
            },
            {"token": "\ufffd", "logprob": -2.0, "bytes": [195], "top_logprobs": []},
        ],
        "refusal": None,
    }
    assert completion == {
        "tokens": [" hi", "\ufffd"],
        "token_logprobs": [-0.5, -2.0],
        "top_logprobs": [{" hi": -0.5, "<|>": -1.0}, {}],
        "text_offset": [0, 3],
    }


def test_logprobs_of_an_older_worker_name_tokens_by_id():
    logprobs = [{"token_id": 7, "logprob": -0.5, "top": [[7, -0.5], [9, -1.0]]}]
    [chat], [completion] = (
        output_row(line, result(logprobs=logprobs))["response"]["body"]["choices"]
        for line in (parse({"messages": HI}), parse({"prompt": "hi"}, COMPLETIONS))
    )
    [token] = chat["logprobs"]["content"]
    assert (token["token"], token["logprob"]) == ("token_id:7", -0.5)
    assert [top["token"] for top in token["top_logprobs"]] == ["token_id:7", "token_id:9"]
    assert completion["logprobs"]["tokens"] == ["token_id:7"]
    assert completion["logprobs"]["top_logprobs"] == [{"token_id:7": -0.5, "token_id:9": -1.0}]
    assert token["bytes"] is None


@pytest.mark.parametrize(
    ("error", "status_code", "code"),
    [
        (InvalidJob("invalid_parameter", "why"), 400, "invalid_parameter"),
        (JobFailed("why", code="prompt_too_long"), 400, "prompt_too_long"),
        (JobFailed("why", code="engine_error"), 500, "engine_error"),
        (JobFailed("why", code="worker_lost"), 500, "worker_lost"),
    ],
)
def test_a_job_that_was_refused_or_failed_has_a_response(error, status_code, code):
    row = error_row(parse({"messages": HI}), error)
    assert row["response"]["status_code"] == status_code
    assert row["response"]["body"]["error"]["code"] == code
    assert row["error"] is None


@pytest.mark.parametrize(
    ("error", "code"), [(JobCancelled("why"), "batch_cancelled"), (JobExpired("why"), "batch_expired")]
)
def test_a_job_that_did_not_run_to_its_end_has_none(error, code):
    row = error_row(parse({"messages": HI}), error)
    assert (row["response"], row["error"]) == (None, {"code": code, "message": "why"})


@pytest.mark.parametrize("prompt", ["Once ", ["Once "]])
def test_an_echo_is_the_prompt_before_the_text(prompt):
    line = parse({"prompt": prompt, "echo": True, "max_tokens": 3}, COMPLETIONS)
    assert line.arguments["sampling"] == {"max_tokens": 3}
    build_submission(**line.arguments)
    assert output_row(line, result())["response"]["body"]["choices"][0]["text"] == "Once out"
    silent = parse({"prompt": prompt, "echo": False}, COMPLETIONS)
    assert output_row(silent, result())["response"]["body"]["choices"][0]["text"] == "out"


def test_a_row_has_the_stop_reason_if_there_is_one():
    line = parse({"messages": HI})
    for reason in ("###", 7):
        [choice] = output_row(line, result(stop_reason=reason))["response"]["body"]["choices"]
        assert choice["stop_reason"] == reason
    assert "stop_reason" not in output_row(line, result())["response"]["body"]["choices"][0]
