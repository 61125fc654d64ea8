"""Bodies of OpenAI's responses: chat and text completions of results, and errors. No I/O."""

from collections.abc import Iterator
from itertools import accumulate, chain, repeat
from typing import Any

from ingine.errors import BadRecord, ErrorCode, InvalidJob, JobFailed
from ingine.message import ToolCall
from ingine.producer.openai.requests import RequestRefused
from ingine.producer.results import Choice, Result

FINISH_LENGTH = "length"
_LOGPROBS_FIELDS = (
    *("token_id", "logprob", "rank", "bytes", "decoded_token"),
    *("top", "top_bytes", "top_decoded_tokens"),
)
_SERVER_ERRORS = (ErrorCode.ENGINE_ERROR, ErrorCode.WORKER_LOST, ErrorCode.BAD_RECORD)


def chat_completion(result: Result, *, model: str | None, created: int) -> dict[str, Any]:
    """Build the body of a chat completion. created: Unix time in seconds."""
    body = {
        "id": f"chatcmpl-{result.job_id}",
        "object": "chat.completion",
        "created": created,
        "model": model or "",
        "choices": [_chat_choice(choice) for choice in result.choices],
        "usage": usage_fields(result.usage),
    }
    if result.prompt_logprobs:  # vLLM's, in its place
        body["prompt_logprobs"] = prompt_logprobs_fields(result.prompt_logprobs)
    return body


def text_completion(result: Result, *, model: str | None, created: int, prompt: str = "") -> dict[str, Any]:
    """Build the body of a text completion. prompt: what each text begins with, see `requests.echoes`."""
    return {
        "id": f"cmpl-{result.job_id}",
        "object": "text_completion",
        "created": created,
        "model": model or "",
        "choices": [_text_choice(choice, prompt, result.prompt_logprobs) for choice in result.choices],
        "usage": usage_fields(result.usage),
    }


def error_response(error: RequestRefused | InvalidJob | JobFailed | BadRecord) -> tuple[int, dict[str, Any]]:
    """Return the HTTP status and the body for a request that was refused or has failed."""
    status_code = 500 if error.code in _SERVER_ERRORS else 400
    fault = {
        "message": str(error),
        "type": "server_error" if status_code == 500 else "invalid_request_error",
        "param": getattr(error, "param", None),
        "code": str(error.code),
    }
    return status_code, {"error": fault}


def usage_fields(usage: dict[str, int]) -> dict[str, Any]:
    """Convert the usage of a result or of a terminal event."""
    num_prompt, num_output = (usage.get(f"num_{side}_tokens", 0) for side in ("prompt", "output"))
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": usage.get("num_cached_tokens", 0)},
    }


def _chat_choice(choice: Choice) -> dict[str, Any]:
    return _choice(choice) | {
        "message": _message(choice.message),
        "logprobs": chat_logprobs(choice.logprobs) if choice.logprobs else None,
    }


def _text_choice(choice: Choice, prompt: str, prompt_logprobs: list[dict | None] | None) -> dict[str, Any]:
    fields = _choice(choice) | {
        "text": prompt + choice.text,
        "logprobs": completion_logprobs(choice.logprobs) if choice.logprobs else None,
    }
    if prompt_logprobs:  # vLLM's, in its place
        fields["prompt_logprobs"] = prompt_logprobs_fields(prompt_logprobs)
    return fields


def _message(message: dict[str, Any]) -> dict[str, Any]:
    """The known fields of a message. A log may have others in it, and those need not be JSON."""
    fields = {"role": "assistant", "content": message["content"], "refusal": None}
    if "reasoning" in message:
        fields["reasoning"] = message["reasoning"]
    if "tool_calls" in message:
        fields["tool_calls"] = [ToolCall.from_openai(call).to_openai() for call in message["tool_calls"]]
    return fields


def prompt_logprobs_fields(prompt_logprobs: list[dict | None]) -> list[dict | None]:
    """Return the known fields of each entry, as `_message` does."""
    return [
        entry and {name: entry[name] for name in _LOGPROBS_FIELDS if name in entry}
        for entry in prompt_logprobs
    ]


def _choice(choice: Choice) -> dict[str, Any]:
    fields: dict[str, Any] = {"index": choice.index, "finish_reason": choice.finish_reason}
    if choice.stop_reason is not None:  # vLLM's
        fields["stop_reason"] = choice.stop_reason
    return fields


def _tokens(logprobs: dict) -> Iterator[tuple[str, float, list[int] | None]]:
    """Yield text, logprob and bytes of the chosen token, then of the likeliest ones.

    If the worker did not send the bytes, the text names the token id, as in vLLM.
    """
    pairs = [(logprobs["token_id"], logprobs["logprob"]), *logprobs["top"]]
    token_bytes = chain((logprobs.get("bytes"),), logprobs.get("top_bytes", ()), repeat(None))
    for (token_id, logprob), named in zip(pairs, token_bytes, strict=False):
        text = f"token_id:{token_id}" if named is None else bytes(named).decode(errors="replace")
        yield text, logprob, named


def chat_logprobs(logprobs: list[dict]) -> dict[str, Any]:
    """Convert logprobs of tokens to those of a chat completion, or of a chunk of one."""
    content = []
    for of_token in logprobs:
        chosen, *top = (
            {"token": text, "logprob": logprob, "bytes": named} for text, logprob, named in _tokens(of_token)
        )
        content.append(chosen | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def completion_logprobs(logprobs: list[dict]) -> dict[str, Any]:
    """Convert logprobs of tokens to those of a text completion, or of a chunk of one."""
    of_tokens = [list(_tokens(of_token)) for of_token in logprobs]
    texts = [text for (text, _, _), *_ in of_tokens]
    return {
        "tokens": texts,
        "token_logprobs": [logprob for (_, logprob, _), *_ in of_tokens],
        "top_logprobs": [{text: logprob for text, logprob, _ in top} for _, *top in of_tokens],
        "text_offset": list(accumulate(map(len, texts[:-1]), initial=0)),
    }
