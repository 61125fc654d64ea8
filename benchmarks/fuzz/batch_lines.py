"""Fuzz lines of a batch's input: each is submitted or refused, and gets a row in one of the two files."""

import json
from random import Random
from typing import Any

from benchmarks.fuzz.mutations import JSON, changed, damaged, nested
from ingine.contract.keys import Priority
from ingine.contract.record import JobStatus
from ingine.errors import InvalidJob
from ingine.producer.openai.batch_format import CHAT_URL, COMPLETIONS_URL, error_row, output_row, parse_line
from ingine.producer.results import Choice, Result
from ingine.producer.submission import build_submission

SAMPLING = {
    "temperature": 0.5, "top_p": 0.9, "max_tokens": 9, "stop": ["x"], "seed": 7, "logit_bias": {"5": 1.5},
    "n": 1, "presence_penalty": 0.5, "frequency_penalty": 0.5, "user": "u", "stream": False, "tools": [],
    "response_format": {"type": "text"},
}  # fmt: skip
MESSAGES = [
    {"role": "system", "content": "x"},
    {"role": "user", "content": [{"type": "text", "text": "y"}, {"type": "text", "text": "z"}]},
]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
ASKED = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "5"},
]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}, "strict": True}}]
SCHEMA = {"name": "s", "strict": True, "schema": {"type": "object", "properties": {"a": {"enum": [1, 2]}}}}
WITH_TOOLS = {
    "messages": ASKED, "tools": TOOLS, "parallel_tool_calls": False, "n": 2,
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "response_format": {"type": "json_schema", "json_schema": SCHEMA},
    "chat_template_kwargs": {"enable_thinking": False},
}  # fmt: skip
CHAT = {"model": "m", "messages": MESSAGES, "logprobs": True, "top_logprobs": 2} | SAMPLING
COMPLETION = {"model": "m", "prompt": "x", "logprobs": 2} | SAMPLING
LINES = (
    {"custom_id": "a", "method": "POST", "url": CHAT_URL, "body": CHAT},
    {"custom_id": "a", "method": "POST", "url": COMPLETIONS_URL, "body": COMPLETION},
    {"custom_id": "a", "url": CHAT_URL, "body": WITH_TOOLS},
    {"custom_id": "a", "url": COMPLETIONS_URL, "body": {"prompt": [[1, 2, 3]], "max_completion_tokens": 4}},
)
WORDS = (b"\\ud800", b"1e999", b"NaN", b"9" * 5000, b'"', b"{", b"[" * 2000, b"\x00", b"\xff", b"\xfe\xff")
RESULT = Result(
    "a", "x", [1], "stop", {}, {}, None, JobStatus.FINISHED, choices=[Choice(0, "x", [1], "stop")]
)


def cases(rng: Random) -> bytes:
    line: Any = rng.choice(LINES)
    if rng.random() < 0.9:
        line = changed(rng, line, JSON)
    if rng.random() < 0.05:
        line = {"custom_id": nested(rng, (900, 3000))}
    try:
        raw = json.dumps(line).encode(rng.choice(("utf-8",) * 8 + ("utf-16", "utf-32")))
    except (ValueError, RecursionError):  # a number or a depth that cannot be written either
        raw = json.dumps(LINES[0]).encode()
    return damaged(rng, raw, WORDS) if rng.random() < 0.4 else raw


def check(case: bytes) -> str:
    line, again = (parse_line(7, case, model=None, known_ids=set()) for _ in range(2))
    assert line.digest == again.digest
    if line.refusal is not None:
        assert json.dumps(error_row(line, line.refusal))
        return line.refusal.code
    try:
        submission = build_submission(
            **line.arguments, job_id=line.job_id, priority=Priority.LOW, stream=False
        )
    except InvalidJob as error:
        assert json.dumps(error_row(line, error))
        return "refused by the door"
    assert submission.cost >= 0 and json.dumps(output_row(line, RESULT))
    return "submitted"
