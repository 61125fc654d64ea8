"""Every error that ingine raises on purpose.

IngineError
├── ConfigError              a setting, flag or file is wrong; the message names it and what it may be
│   ├── ModelNotFound        no such model name, folder, file or hub id
│   └── UnsupportedModel     the architecture (or a feature of it) is not one of ours; lists those that are
├── InvalidRequest           a request the engine refuses; has a stable `code`, see `ErrorCode`
│   └── InvalidJob           a wire job that cannot be run as sent (`ingine.contract.jobs`); a ClientError too
├── EngineError              the engine failed while it ran; nothing is wrong with the request
└── ClientError              what a call of a producer or consumer raises
    ├── InvalidArgument      an argument of the call is wrong; a TypeError and a ValueError too
    ├── QueueFull            the queue is at its limit of jobs or bytes; nothing was accepted
    ├── RateLimited          the tenant submits faster than the queue allows; nothing was accepted
    ├── DuplicateJob         a job with this id exists already
    ├── NoWorker             no worker serves the queue, and the client requires one; nothing was accepted
    ├── JobNotFound          no such job: never submitted, or its result's TTL has passed
    ├── JobFailed            the job ended in `failed`; has the `code` of its terminal event
    ├── JobCancelled         the job ended in `cancelled`
    ├── JobExpired           the job's deadline passed before it finished
    ├── BadRecord            the server has something under a job's keys that no worker wrote; has a `code`
    │   └── UnknownStatus    the job is in a status that this version does not know; a newer one may
    ├── ResultTimeout        no terminal event within the caller's own timeout; the job goes on
    └── ServerUnavailable    Redis cannot be reached, or refuses the command
"""

from collections.abc import Sequence
from enum import StrEnum
from typing import Any


class ErrorCode(StrEnum):
    """Why a job failed or was buried. Part of the contract: a code never changes its meaning."""

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
    """A request that can never run as it is. Sending it again unchanged will fail again."""

    def __init__(self, code: ErrorCode, message: str):
        super().__init__(message)
        self.code = code


class EngineError(IngineError):
    pass


class ClientError(IngineError):
    accepted: Sequence[Any] = ()
    """Raised by `submit_many`: the handles of the jobs that were accepted all the same."""


class InvalidJob(InvalidRequest, ClientError):
    """A wire job that cannot be run. `job_id` is None where not even that could be read."""

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
    """A job's record, its token log or its reply is not what workers write. Asking again changes nothing."""

    code = ErrorCode.BAD_RECORD


class UnknownStatus(BadRecord):
    """A newer worker has written it, or anybody else. An upgraded client may be able to read it."""


class ResultTimeout(ClientError):
    pass


class ServerUnavailable(ClientError):
    pass
