"""OpenAI's Batch file format: converts input lines to jobs, and results to output lines. No I/O.

Unsupported parameters are refused by name unless their value has no effect: a line never runs as anything
other than what it asks for.
"""

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, repeat
from typing import Any

from ingine.errors import (
    BadRecord,
    ClientError,
    ErrorCode,
    IngineError,
    InvalidJob,
    JobCancelled,
    JobExpired,
    JobFailed,
)
from ingine.producer.results import Choice, Result
from ingine.sampling_params import NEUTRAL_PARAMS, SamplingParams, is_neutral

CHAT_URL, COMPLETIONS_URL = "/v1/chat/completions", "/v1/completions"
_IGNORED = {
    *("user", "store", "metadata", "service_tier"),
    *("safety_identifier", "prompt_cache_key", "prompt_cache_retention", "parallel_tool_calls"),
}
"""Parameters that never change the output."""
_NEUTRAL: dict[str, tuple[Any, ...]] = NEUTRAL_PARAMS | {
    # OpenAI's:
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "verbosity": ("medium",),
    # vLLM's:
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "priority": (0,),
}
"""Unsupported parameters, each with the values that have no effect. Null never has one."""
_RENAMED = {"max_completion_tokens": "max_tokens"}
FINISH_LENGTH = "length"
_SERVER_ERRORS = (ErrorCode.ENGINE_ERROR, ErrorCode.WORKER_LOST, ErrorCode.BAD_RECORD)


class LineRefused(ClientError):
    """An input line that cannot be run."""

    def __init__(self, code: str, message: str, param: str | None = None):
        super().__init__(message)
        self.code, self.param = code, param


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the input, either to be run or refused."""

    number: int
    digest: str
    """Digest of everything that decides the result. It is the same in every run, so it names row and job."""
    custom_id: str | None
    url: str | None = None
    arguments: dict[str, Any] | None = None
    """Arguments of `submit`. None if the line is refused."""
    echo: bool = False
    """The text of the row begins with the prompt."""
    refusal: LineRefused | None = None

    @property
    def row_id(self) -> str:
        return f"batch_req_{self.digest}"

    @property
    def job_id(self) -> str:
        return f"batch-{self.digest}"


def parse_line(number: int, raw: bytes, *, model: str | None, known_ids: set[str]) -> Line:
    """Parse one input line. Never raises: a bad line is refused.

    model: overrides the body's. known_ids: the custom_ids so far, to which this line's is added.
    """
    custom_id = None
    digest = _digest(number, raw.decode(errors="replace"))  # for a line without a valid custom_id
    try:
        fields = _object(raw)
        custom_id = _custom_id(fields)
        if custom_id in known_ids:
            raise LineRefused("duplicate_custom_id", f"custom_id {custom_id!r} was used before", "custom_id")
        known_ids.add(custom_id)
        digest = _digest(custom_id, *(fields.get(name) for name in ("method", "url", "body")), model)
        arguments = _arguments(fields, model)
        return Line(number, digest, custom_id, fields["url"], arguments, _echoes(fields, arguments))
    except LineRefused as error:
        refusal = LineRefused(error.code, f"line {number}: {error}", error.param)
    except RecursionError:
        refusal = LineRefused("invalid_json", f"line {number}: nested too deep")
    return Line(number, digest, custom_id, refusal=refusal)


def _object(raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw)
    except ValueError as error:
        raise LineRefused("invalid_json", f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise LineRefused("invalid_line", f"must be an object, not {type(fields).__name__}")
    return fields


def _custom_id(fields: dict[str, Any]) -> str:
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise LineRefused("missing_custom_id", "custom_id must be a string, and not empty", "custom_id")
    return custom_id


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _arguments(fields: dict[str, Any], model: str | None) -> dict[str, Any]:
    if fields.get("method", "POST") != "POST":
        raise LineRefused("invalid_method", "method must be POST", "method")
    url, body = fields.get("url"), fields.get("body")
    if url not in (CHAT_URL, COMPLETIONS_URL):
        raise LineRefused("invalid_url", f"url must be {CHAT_URL} or {COMPLETIONS_URL}", "url")
    if not isinstance(body, dict):
        raise LineRefused("invalid_body", "body must be an object", "body")
    body = {name: value for name, value in body.items() if value is not None}
    arguments: dict[str, Any] = {"model": model or body.get("model")}
    body.pop("model", None)
    if url == CHAT_URL:
        arguments["messages"] = _messages(body.pop("messages", None))
    else:
        arguments["prompt"] = _prompt(body.pop("prompt", None))
        body.pop("echo", None)
    arguments["sampling"] = _sampling(body, chat=url == CHAT_URL)
    return arguments


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise LineRefused("invalid_messages", "messages must be a list of objects", "messages")
    return [message | {"content": _content(message.get("content"), n)} for n, message in enumerate(messages)]


def _content(content: Any, number: int) -> str:
    """The content as text; parts of type text are joined."""
    where = f"messages.{number}.content"
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise LineRefused("invalid_messages", f"{where} must be text or a list of text parts", where)
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise LineRefused("unsupported_content", f"{where}: only parts of type text are supported", where)
    return "".join(part["text"] for part in content)


def _prompt(prompt: Any) -> Any:
    if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int):
        if len(prompt) > 1:
            raise LineRefused("unsupported_parameter", "prompt: one prompt a line, not several", "prompt")
        return prompt[0]
    return prompt


def _echoes(fields: dict[str, Any], arguments: dict[str, Any]) -> bool:
    """Whether the row is to begin with the prompt, whose text only this side has."""
    echo, sampling = fields["body"].get("echo"), arguments["sampling"]
    if fields["url"] != COMPLETIONS_URL or not echo:
        return False
    if echo is not True:
        raise LineRefused("invalid_parameter", "echo must be true or false", "echo")
    if not isinstance(arguments["prompt"], str):
        raise LineRefused("unsupported_parameter", "echo: the prompt must be text, not token ids", "echo")
    for name in ("logprobs", "truncate_prompt_tokens"):
        if sampling.get(name) is not None:
            raise LineRefused("unsupported_parameter", f"echo is not supported with {name}", "echo")
    return True


def _sampling(body: dict[str, Any], *, chat: bool) -> dict[str, Any]:
    sampling = {}
    neutral = _NEUTRAL | {"add_special_tokens": (not chat,)}  # what a worker does anyway
    if "max_completion_tokens" in body:
        body.pop("max_tokens", None)  # its older name
    if chat:  # a completion's `logprobs` is the number itself
        wanted, num_top = body.pop("logprobs", False), body.pop("top_logprobs", 0)
        if wanted:
            sampling["logprobs"] = num_top
        elif num_top:
            raise LineRefused("invalid_parameter", "top_logprobs needs logprobs: true", "top_logprobs")
    for name, value in body.items():
        if name == "n" and is_neutral(value, (1,)):
            continue
        if _RENAMED.get(name, name) in SamplingParams.model_fields:
            sampling[_RENAMED.get(name, name)] = _bias(value) if name == "logit_bias" else value
        elif name not in _IGNORED and not is_neutral(value, neutral.get(name, ())):
            raise LineRefused("unsupported_parameter", f"{name} is not supported", name)
    return sampling


def _bias(bias: Any) -> Any:
    """Make the keys integers, which JSON lacks. Leaves a bad value to validation, which names the fault."""
    try:
        return {int(token_id): value for token_id, value in bias.items()}
    except (AttributeError, ValueError):
        return bias


# ---------------------------------------------------------------------------------------------- rows


def output_row(line: Line, result: Result) -> dict[str, Any]:
    """Build a row of the output file."""
    chat = line.url == CHAT_URL
    prefix = line.arguments["prompt"] if line.echo else ""
    choices = [_choice_fields(choice, prefix, chat=chat) for choice in result.choices]
    if result.prompt_logprobs and not chat:  # vLLM's, in its places
        for choice in choices:
            choice["prompt_logprobs"] = result.prompt_logprobs
    num_prompt, num_output = (result.usage.get(f"num_{side}_tokens", 0) for side in ("prompt", "output"))
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{result.job_id}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": line.arguments["model"],
        "choices": choices,
        "usage": {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_output,
            "total_tokens": num_prompt + num_output,
            "prompt_tokens_details": {"cached_tokens": result.usage.get("num_cached_tokens", 0)},
        },
    }
    if result.prompt_logprobs and chat:
        body["prompt_logprobs"] = result.prompt_logprobs
    return _row(line, {"status_code": 200, "request_id": result.job_id, "body": body}, None)


def _choice_fields(choice: Choice, prefix: str, *, chat: bool) -> dict[str, Any]:
    """Return one of a row's `choices`. prefix: the text before a completion's own, see `Line.echo`."""
    fields: dict[str, Any] = {
        "index": choice.index,
        "finish_reason": choice.finish_reason,
        "logprobs": None,
    }
    if choice.stop_reason is not None:  # vLLM's
        fields["stop_reason"] = choice.stop_reason
    if chat:
        fields["message"] = {"role": "assistant", "content": choice.text, "refusal": None}
    else:
        fields["text"] = prefix + choice.text
    if choice.logprobs:
        fields["logprobs"] = (_chat_logprobs if chat else _completion_logprobs)(choice.logprobs)
    return fields


def is_cut(row: dict[str, Any]) -> bool:
    """True if a choice in a row of the output file was cut by length. Accepts rows of any origin."""
    try:
        choices = row["response"]["body"]["choices"]
        return any(choice["finish_reason"] == FINISH_LENGTH for choice in choices)
    except (KeyError, TypeError, IndexError):
        return False


def error_row(line: Line, error: IngineError) -> dict[str, Any]:
    """Build a row of the error file: with a response for a refused or failed line, with an `error` for a
    cancelled or expired one."""
    if isinstance(error, (JobCancelled, JobExpired)):
        code = "batch_cancelled" if isinstance(error, JobCancelled) else "batch_expired"
        return _row(line, None, {"code": code, "message": str(error)})
    assert isinstance(error, (LineRefused, InvalidJob, JobFailed, BadRecord))
    status_code = 500 if error.code in _SERVER_ERRORS else 400
    fault = {
        "message": str(error),
        "type": "server_error" if status_code == 500 else "invalid_request_error",
        "param": getattr(error, "param", None),
        "code": str(error.code),
    }
    response = {"status_code": status_code, "request_id": line.job_id, "body": {"error": fault}}
    return _row(line, response, None)


def _row(line: Line, response: dict | None, error: dict | None) -> dict[str, Any]:
    return {"id": line.row_id, "custom_id": line.custom_id, "response": response, "error": error}


def _tokens(logprobs: dict) -> Iterator[tuple[str, float, list[int] | None]]:
    """Yield text, logprob and bytes of the chosen token, then of the likeliest ones.

    If the worker did not send the bytes, the text names the token id, as in vLLM.
    """
    pairs = [(logprobs["token_id"], logprobs["logprob"]), *logprobs["top"]]
    token_bytes = chain((logprobs.get("bytes"),), logprobs.get("top_bytes", ()), repeat(None))
    for (token_id, logprob), named in zip(pairs, token_bytes, strict=False):
        text = f"token_id:{token_id}" if named is None else bytes(named).decode(errors="replace")
        yield text, logprob, named


def _chat_logprobs(logprobs: list[dict]) -> dict[str, Any]:
    content = []
    for of_token in logprobs:
        chosen, *top = (
            {"token": text, "logprob": logprob, "bytes": named} for text, logprob, named in _tokens(of_token)
        )
        content.append(chosen | {"top_logprobs": top})
    return {"content": content, "refusal": None}


def _completion_logprobs(logprobs: list[dict]) -> dict[str, Any]:
    of_tokens = [list(_tokens(of_token)) for of_token in logprobs]
    texts = [text for (text, _, _), *_ in of_tokens]
    return {
        "tokens": texts,
        "token_logprobs": [logprob for (_, logprob, _), *_ in of_tokens],
        "top_logprobs": [{text: logprob for text, logprob, _ in top} for _, *top in of_tokens],
        "text_offset": list(accumulate(map(len, texts[:-1]), initial=0)),
    }
