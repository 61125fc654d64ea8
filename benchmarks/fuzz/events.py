"""Fuzz token and terminal events: what is decoded has the types that consumers rely on."""

import contextlib
import json
from random import Random

from benchmarks.fuzz.mutations import packed_case
from benchmarks.fuzz.running import outcome
from ingine.contract.events import UNREADABLE, TerminalEvent, TokensEvent, decode_event, encode_event
from ingine.errors import ClientError
from ingine.producer.handle import _result
from ingine.producer.openai.batch_format import CHAT_URL, COMPLETIONS_URL, Line, output_row
from ingine.producer.results import raise_unless_finished

LOGPROBS = [
    {"token_id": 5, "logprob": -0.5, "top": [[5, -0.5], [6, -1.5]], "bytes": [97], "top_bytes": [[97], [98]]},
    {"token_id": 6, "logprob": -1.5, "top": []},
]
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
DELTA = {"content": "x", "reasoning": "y", "tool_calls": [{"index": 0} | CALL]}
VALID = (
    {"type": "tokens", "position": 1, "token_ids": [5], "text": "a", "delta": DELTA},
    {"type": "tokens", "position": 1, "token_ids": [5], "text": "a", "prompt_logprobs": [None, *LOGPROBS]},
    {
        "type": "finished", "position": 2, "job_id": "a", "text": "x", "finish_reason": "tool_calls",
        "delta": {"content": "x"}, "message": {"role": "assistant", "content": None, "tool_calls": [CALL]},
    },
    {"type": "tokens", "position": 4, "token_ids": [5, 6], "text": "ab", "logprobs": LOGPROBS},
    {"type": "tokens", "position": 2, "token_ids": [5, 6], "text": "ab"},
    {
        "type": "finished", "position": 2, "job_id": "a", "text": "x", "finish_reason": "stop",
        "usage": {"num_prompt_tokens": 3, "num_output_tokens": 2}, "metadata": {"key": [1]},
        "timings": {"total_ms": 1.5, "attempts": 1},
    },
    {
        "type": "failed", "position": 0, "job_id": "a", "finish_reason": "error",
        "error": {"code": "engine_error", "message": "x"}, "timings": {"first_token_ms": None},
    },
)  # fmt: skip
LAST = TerminalEvent(2, status="finished", job_id="a", finish_reason="stop")


def cases(rng: Random) -> bytes:
    return packed_case(rng, rng.choice(VALID))


def check(case: bytes) -> str:
    event, result = outcome(lambda: decode_event(case), *UNREADABLE)
    if event is None:
        return result
    raw = encode_event(event)
    assert encode_event(decode_event(raw)) == raw  # as bytes: what is not a number is not equal to itself
    check_types(event)
    use(event)
    return type(event).__name__


def check_types(event: TokensEvent | TerminalEvent) -> None:
    assert type(event.position) is int and event.position >= 0 and type(event.text) is str
    if isinstance(event, TokensEvent):
        assert all(type(token_id) is int and token_id >= 0 for token_id in event.token_ids)
        assert event.position >= len(event.token_ids)
        return
    assert event.status not in ("delayed", "queued", "running")
    assert type(event.job_id) is str and event.job_id
    assert event.finish_reason is None or type(event.finish_reason) is str
    for fields in (event.error or {}, event.usage, event.timings, event.metadata or {}):
        assert type(fields) is dict


def use(event: TokensEvent | TerminalEvent) -> None:
    """Use an event as streams, results, and `ingine batch` do."""
    if isinstance(event, TokensEvent):
        result = _result([event, LAST])
    else:
        with contextlib.suppress(ClientError):
            raise_unless_finished(event)
            result = _result([event])
        if event.status != "finished":
            return
    for url in (CHAT_URL, COMPLETIONS_URL):
        line = Line(1, "0" * 32, "x", url, {"model": None})
        assert json.dumps(output_row(line, result))
