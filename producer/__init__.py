"""What other services import to use ingine: submit jobs, follow their tokens. Never imports torch.

from producer import Client

with Client() as client:
    for chunk in client.submit("Once upon a time", max_tokens=64).stream():
        print(chunk.text, end="", flush=True)
"""

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
from ingine.keys import Priority
from ingine.sampling_params import SamplingParams
from ingine.wire import Job, JobStatus
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
