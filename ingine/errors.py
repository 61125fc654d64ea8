"""Every error that ingine raises on purpose.

IngineError
├── ConfigError              a setting, flag or file is wrong; the message names it and the valid values
│   ├── ModelNotFound        no such model name, folder, file or hub id
│   └── UnsupportedModel     the architecture, or a feature of it, is not supported; lists those that are
├── InvalidRequest           the engine rejects the request; has a stable `code`, see `ErrorCode`
│   └── InvalidJob           the job cannot be run as sent (`ingine.contract.jobs`); also a ClientError
├── EngineError              the engine failed while it ran; nothing is wrong with the request
└── ClientError              a call of a producer or consumer failed
    ├── InvalidArgument      an argument of the call is wrong; also a TypeError and a ValueError
    ├── QueueFull            the queue has reached its limit of jobs or bytes; nothing was accepted
    ├── RateLimited          the tenant submits faster than the queue allows; nothing was accepted
    ├── DuplicateJob         a job with this id exists already
    ├── NoWorker             no worker serves the queue, and the client requires one; nothing was accepted
    ├── JobNotFound          no such job: never submitted, or its result's TTL has passed
    ├── JobFailed            the job ended in `failed`; has the `code` of its terminal event
    ├── JobCancelled         the job ended in `cancelled`
    ├── JobExpired           the job's deadline passed before it finished
    ├── BadRecord            a job's keys hold something that no worker wrote; has a `code`
    │   └── UnknownStatus    this version does not know the job's status; a newer version may
    ├── ResultTimeout        no terminal event within the caller's own timeout; the job goes on
    └── ServerUnavailable    Redis cannot be reached, or rejects the command
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any


class ErrorCode(StrEnum):
    """Why a job failed or became a dead letter. Part of the contract: a code never changes its meaning."""

    NOT_MSGPACK = "not_msgpack"
    INVALID_SHAPE = "invalid_shape"
    UNKNOWN_FIELD = "unknown_field"
    INVALID_TYPE = "invalid_type"
    INVALID_PARAMETER = "invalid_parameter"
    UNSUPPORTED_VERSION = "unsupported_version"
    JOB_TOO_LARGE = "job_too_large"
    NESTED_TOO_DEEP = "nested_too_deep"
    DUPLICATE_ID = "duplicate_id"
    EMPTY_PROMPT = "empty_prompt"
    PROMPT_TOO_LONG = "prompt_too_long"
    PROMPT_TOO_COSTLY = "prompt_too_costly"
    INVALID_TOKEN_ID = "invalid_token_id"
    UNKNOWN_MODEL = "unknown_model"
    MODEL_CHANGED = "model_changed"
    NO_CHAT_TEMPLATE = "no_chat_template"
    INVALID_MESSAGES = "invalid_messages"
    INVALID_GRAMMAR = "invalid_grammar"
    UNSUPPORTED_GRAMMAR = "unsupported_grammar"
    GRAMMAR_TOO_COSTLY = "grammar_too_costly"
    GRAMMAR_FAILED = "grammar_failed"
    NO_ALLOWED_TOKEN = "no_allowed_token"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    WORKER_LOST = "worker_lost"
    ENGINE_ERROR = "engine_error"
    BAD_RECORD = "bad_record"


class IngineError(Exception):
    """Base of all errors raised on purpose."""


class ConfigError(IngineError):
    pass


class ModelNotFound(ConfigError):
    pass


class UnsupportedModel(ConfigError):
    pass


class InvalidRequest(IngineError):
    """The request can never run as it is. Sending it again unchanged fails again."""

    def __init__(self, code: ErrorCode, message: str):
        super().__init__(message)
        self.code = code


class EngineError(IngineError):
    pass


class ClientError(IngineError):
    accepted: Sequence[Any] = ()
    """If `submit_many` raised the error, the handles of the jobs that were accepted nevertheless."""


class InvalidJob(InvalidRequest, ClientError):
    """The job cannot be run as sent. `job_id` is None if not even that could be read."""

    def __init__(
        self, code: ErrorCode, message: str, *, job_id: str | None = None, reply_to: str | None = None
    ):
        super().__init__(code, message)
        self.job_id = job_id
        self.reply_to = reply_to


class InvalidArgument(ClientError, TypeError, ValueError):
    pass


class QueueFull(ClientError):
    pass


class RateLimited(ClientError):
    def __init__(self, message: str, *, retry_after_s: float):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DuplicateJob(ClientError):
    pass


class NoWorker(ClientError):
    pass


class JobNotFound(ClientError):
    pass


class JobFailed(ClientError):
    def __init__(self, message: str, *, code: str):
        super().__init__(message)
        self.code = code


class JobCancelled(ClientError):
    pass


class JobExpired(ClientError):
    pass


class BadRecord(ClientError):
    """A job's record, token log or reply is not as workers write it. Retrying does not help."""

    code = ErrorCode.BAD_RECORD


class UnknownStatus(BadRecord):
    """The status was written by a newer worker, or by something else. An upgraded client may know it."""


class ResultTimeout(ClientError):
    pass


class ServerUnavailable(ClientError):
    pass
