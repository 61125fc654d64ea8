"""Errors as OpenAI's API has them: `{"error": {message, type, param, code}}`, for every status."""

import logging
import math
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any

from ingine.errors import (
    BadRecord,
    ClientError,
    ErrorCode,
    IngineError,
    InvalidArgument,
    InvalidRequest,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobNotFound,
    NoWorker,
    QueueFull,
    RateLimited,
    ServerUnavailable,
)
from ingine.producer.openai.requests import RequestRefused

logger = logging.getLogger("gateway")

INVALID, SERVER, RATE = "invalid_request_error", "server_error", "rate_limit_error"
FULL_RETRY_S, NO_WORKER_RETRY_S, UNAVAILABLE_RETRY_S = 2.0, 5.0, 1.0
"""When a client may try again. A worker is started, or a server fails over, in seconds."""
NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's clients repeat a request after any status from 500 on, unless this header is there."""


class Refused(ClientError):
    """The gateway itself refuses the request: nothing was submitted."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.headers = status, code, param, headers or {}


@dataclass(frozen=True, slots=True)
class Fault:
    """What a client gets instead of an answer."""

    status: int
    type: str
    code: str | None
    message: str
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def body(self) -> dict[str, Any]:
        error = {"message": self.message, "type": self.type, "param": self.param, "code": self.code}
        return {"error": error}


CODES: dict[str, tuple[int, str]] = {
    ErrorCode.JOB_TOO_LARGE: (413, ErrorCode.JOB_TOO_LARGE),
    ErrorCode.UNKNOWN_MODEL: (404, "model_not_found"),
    ErrorCode.MODEL_CHANGED: (500, ErrorCode.MODEL_CHANGED),
    ErrorCode.PROMPT_TOO_LONG: (400, "context_length_exceeded"),
    ErrorCode.WORKER_LOST: (500, ErrorCode.WORKER_LOST),
    ErrorCode.ENGINE_ERROR: (500, ErrorCode.ENGINE_ERROR),
    ErrorCode.GRAMMAR_FAILED: (500, ErrorCode.GRAMMAR_FAILED),
    ErrorCode.NO_ALLOWED_TOKEN: (500, ErrorCode.NO_ALLOWED_TOKEN),
    ErrorCode.BAD_RECORD: (500, ErrorCode.BAD_RECORD),
    ErrorCode.DEADLINE_EXCEEDED: (504, ErrorCode.DEADLINE_EXCEEDED),
}
"""Code of a job's failure -> status and OpenAI's code, where clients look for one. The status of any other
code is 400: the job cannot run as it was sent."""


def fault_of(error: Exception) -> Fault:
    """Describe an error for the client. What only concerns the operator is logged, and not returned."""
    message = str(error)
    param = getattr(error, "param", None)
    match error:
        case Refused():
            kind = SERVER if error.status >= 500 else INVALID
            return Fault(error.status, kind, error.code, message, param, error.headers)
        case QueueFull():
            return Fault(429, RATE, "queue_full", message, headers=retry_after(FULL_RETRY_S))
        case RateLimited():
            return Fault(429, RATE, "rate_limit_exceeded", message, headers=retry_after(error.retry_after_s))
        case NoWorker():
            return Fault(503, SERVER, "no_worker", message, headers=retry_after(NO_WORKER_RETRY_S))
        case ServerUnavailable():
            logger.warning("server unavailable: %s", error)
            hidden = "the queue cannot be reached at the moment: try again"
            return Fault(503, SERVER, "server_unavailable", hidden, headers=retry_after(UNAVAILABLE_RETRY_S))
        case JobNotFound():
            return Fault(404, INVALID, "not_found", message)
        case JobCancelled():
            return Fault(500, SERVER, "cancelled", message, headers=NO_RETRY)
        case JobExpired():
            return Fault(504, SERVER, str(ErrorCode.DEADLINE_EXCEEDED), message, headers=NO_RETRY)
        case JobFailed() | InvalidRequest() | BadRecord():
            status, code = CODES.get(error.code, (400, error.code))
            return Fault(status, SERVER if status >= 500 else INVALID, str(code), message, param)
        case InvalidArgument():
            return Fault(400, INVALID, str(ErrorCode.INVALID_PARAMETER), message)
        case RequestRefused():
            return Fault(400, INVALID, error.code, message, param)
        case IngineError():
            logger.error("request failed: %s", error)
    return internal_error()


def internal_error() -> Fault:
    return Fault(500, SERVER, "internal_error", "the gateway failed; its log says why")


def fault_of_status(status: int) -> Fault:
    """Describe a refusal of the router, which has only a status."""
    code = {404: "not_found", 405: "method_not_allowed"}.get(status, "invalid_request")
    message = {404: "there is no such path", 405: "this path does not have that method"}
    return Fault(status, INVALID, code, message.get(status, HTTPStatus(status).phrase))


def retry_after(seconds: float) -> dict[str, str]:
    """The headers that say when to try again. `retry-after` is in whole seconds, and older."""
    ms = max(1, math.ceil(seconds * 1000))
    return {"retry-after": str(math.ceil(ms / 1000)), "retry-after-ms": str(ms)}
