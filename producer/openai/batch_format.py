"""OpenAI's Batch file format: converts input lines to jobs, and results to output lines. No I/O."""

import hashlib
import json
import time
from dataclasses import dataclass
from typing import Any, Protocol

from ingine.errors import BadRecord, IngineError, InvalidJob, JobCancelled, JobExpired, JobFailed
from ingine.producer.openai.requests import RequestRefused, chat_arguments, completion_arguments, echoes
from ingine.producer.openai.responses import FINISH_LENGTH, chat_completion, error_response, text_completion
from ingine.producer.results import Result

CHAT_URL, COMPLETIONS_URL = "/v1/chat/completions", "/v1/completions"


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
    refusal: RequestRefused | None = None

    @property
    def row_id(self) -> str:
        return f"batch_req_{self.digest}"

    @property
    def job_id(self) -> str:
        return f"batch-{self.digest}"


class Ids(Protocol):
    """A set of custom_ids."""

    def __contains__(self, custom_id: str, /) -> bool: ...
    def add(self, custom_id: str, /) -> None: ...


def parse_line(number: int, raw: bytes, *, model: str | None, known_ids: Ids) -> Line:
    """Parse one input line. Never raises: a bad line is refused.

    model: overrides the body's. known_ids: the custom_ids so far, to which this line's is added.
    """
    custom_id = None
    digest = _digest(number, raw.decode(errors="replace"))  # for a line without a valid custom_id
    try:
        fields = _object(raw)
        custom_id = _custom_id(fields)
        if custom_id in known_ids:
            message = f"custom_id {custom_id!r} was used before"
            raise RequestRefused("duplicate_custom_id", message, "custom_id")
        known_ids.add(custom_id)
        digest = _digest(custom_id, *(fields.get(name) for name in ("method", "url", "body")), model)
        url, body = _request(fields)
        arguments = (chat_arguments if url == CHAT_URL else completion_arguments)(body, model)
        echo = url == COMPLETIONS_URL and echoes(body, arguments)
        return Line(number, digest, custom_id, url, arguments, echo)
    except RequestRefused as error:
        refusal = RequestRefused(error.code, f"line {number}: {error}", error.param)
    except RecursionError:
        refusal = RequestRefused("invalid_json", f"line {number}: nested too deep")
    return Line(number, digest, custom_id, refusal=refusal)


def _object(raw: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(raw)
    except ValueError as error:
        raise RequestRefused("invalid_json", f"not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise RequestRefused("invalid_line", f"must be an object, not {type(fields).__name__}")
    return fields


def _custom_id(fields: dict[str, Any]) -> str:
    custom_id = fields.get("custom_id")
    if not isinstance(custom_id, str) or not custom_id:
        raise RequestRefused("missing_custom_id", "custom_id must be a string, and not empty", "custom_id")
    return custom_id


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _request(fields: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the URL and the body."""
    if fields.get("method", "POST") != "POST":
        raise RequestRefused("invalid_method", "method must be POST", "method")
    url, body = fields.get("url"), fields.get("body")
    if url not in (CHAT_URL, COMPLETIONS_URL):
        raise RequestRefused("invalid_url", f"url must be {CHAT_URL} or {COMPLETIONS_URL}", "url")
    if not isinstance(body, dict):
        raise RequestRefused("invalid_body", "body must be an object", "body")
    return url, body


# ---------------------------------------------------------------------------------------------- rows


def output_row(line: Line, result: Result) -> dict[str, Any]:
    """Build a row of the output file."""
    model, created = line.arguments["model"], int(time.time())
    if line.url == CHAT_URL:
        body = chat_completion(result, model=model, created=created)
    else:
        prompt = line.arguments["prompt"] if line.echo else ""
        body = text_completion(result, model=model, created=created, prompt=prompt)
    return _row(line, {"status_code": 200, "request_id": result.job_id, "body": body}, None)


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
    assert isinstance(error, (RequestRefused, InvalidJob, JobFailed, BadRecord))
    status_code, body = error_response(error)
    return _row(line, {"status_code": status_code, "request_id": line.job_id, "body": body}, None)


def _row(line: Line, response: dict | None, error: dict | None) -> dict[str, Any]:
    return {"id": line.row_id, "custom_id": line.custom_id, "response": response, "error": error}
