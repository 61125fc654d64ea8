"""What other services import to use ingine: submit jobs, follow their tokens. Never imports torch.

from producer import Client

with Client() as client:
    for chunk in client.submit("Once upon a time", max_tokens=64).stream():
        print(chunk.text, end="", flush=True)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ingine.errors import (
        BadRecord,
        ClientError,
        ConfigError,
        DuplicateJob,
        ErrorCode,
        IngineError,
        InvalidArgument,
        InvalidJob,
        JobCancelled,
        JobExpired,
        JobFailed,
        JobNotFound,
        NoWorker,
        QueueFull,
        RateLimited,
        ResultTimeout,
        ServerUnavailable,
        UnknownStatus,
    )
    from ingine.jobs import Job
    from ingine.keys import Priority
    from ingine.record import JobStatus
    from ingine.sampling_params import SamplingParams
    from producer.client import AsyncClient
    from producer.handle import AsyncJobHandle
    from producer.replies import Reply
    from producer.results import Chunk, DeadLetter, JobInfo, QueuedJob, QueueInfo, Result
    from producer.sync import Client, JobHandle

__all__ = [
    "AsyncClient",
    "AsyncJobHandle",
    "BadRecord",
    "Chunk",
    "Client",
    "ClientError",
    "ConfigError",
    "DeadLetter",
    "DuplicateJob",
    "ErrorCode",
    "IngineError",
    "InvalidArgument",
    "InvalidJob",
    "Job",
    "JobCancelled",
    "JobExpired",
    "JobFailed",
    "JobHandle",
    "JobInfo",
    "JobNotFound",
    "JobStatus",
    "NoWorker",
    "Priority",
    "QueueFull",
    "QueueInfo",
    "QueuedJob",
    "RateLimited",
    "Reply",
    "Result",
    "ResultTimeout",
    "SamplingParams",
    "ServerUnavailable",
    "UnknownStatus",
]

_HOMES = {
    "Priority": "ingine.keys",
    "SamplingParams": "ingine.sampling_params",
    "Job": "ingine.jobs",
    "JobStatus": "ingine.record",
    "AsyncClient": "producer.client",
    "AsyncJobHandle": "producer.handle",
    "Reply": "producer.replies",
    "Chunk": "producer.results",
    "DeadLetter": "producer.results",
    "JobInfo": "producer.results",
    "QueuedJob": "producer.results",
    "QueueInfo": "producer.results",
    "Result": "producer.results",
    "Client": "producer.sync",
    "JobHandle": "producer.sync",
}
"""Where each name lies, but for the errors."""


def __getattr__(name: str):
    # Lazy: what a program pays for redis, pydantic and asyncio, it pays when it first makes a client.
    if name not in __all__:
        raise AttributeError(f"module 'producer' has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_HOMES.get(name, "ingine.errors")), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
