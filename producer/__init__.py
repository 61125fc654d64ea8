"""The library for services that use ingine: submit jobs, follow their tokens. Never imports torch.

from ingine import Client

with Client() as client:
    for chunk in client.submit("Once upon a time", max_tokens=64).stream():
        print(chunk.text, end="", flush=True)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ingine.contract.jobs import Job
    from ingine.contract.keys import Priority
    from ingine.contract.record import JobStatus
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
    from ingine.producer.client import AsyncClient
    from ingine.producer.handle import AsyncJobHandle
    from ingine.producer.replies import Reply
    from ingine.producer.results import Choice, Chunk, DeadLetter, JobInfo, QueuedJob, QueueInfo, Result
    from ingine.producer.sync import Client, JobHandle
    from ingine.sampling_params import SamplingParams

__all__ = [
    "AsyncClient",
    "AsyncJobHandle",
    "BadRecord",
    "Choice",
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
    "Priority": "ingine.contract.keys",
    "SamplingParams": "ingine.sampling_params",
    "Job": "ingine.contract.jobs",
    "JobStatus": "ingine.contract.record",
    "AsyncClient": "ingine.producer.client",
    "AsyncJobHandle": "ingine.producer.handle",
    "Reply": "ingine.producer.replies",
    "Choice": "ingine.producer.results",
    "Chunk": "ingine.producer.results",
    "DeadLetter": "ingine.producer.results",
    "JobInfo": "ingine.producer.results",
    "QueuedJob": "ingine.producer.results",
    "QueueInfo": "ingine.producer.results",
    "Result": "ingine.producer.results",
    "Client": "ingine.producer.sync",
    "JobHandle": "ingine.producer.sync",
}
"""The module of each name; the errors are all in `ingine.errors`."""


if not TYPE_CHECKING:  # a type checker takes a module with __getattr__ to have every name

    def __getattr__(name: str):
        # Lazy: a program loads redis, pydantic and asyncio only when it first makes a client.
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        found = globals()[name] = getattr(import_module(_HOMES.get(name, "ingine.errors")), name)
        return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
