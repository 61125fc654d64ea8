"""A job's record, the hash at `Keys.job`: the states of a job, and how to read the record's fields.

Any client may have written them, so every field is validated.
"""

import re
from enum import StrEnum

from ingine.errors import BadRecord, UnknownStatus

STATUS_NAME = re.compile(r"[a-z_]{1,32}")
"""Matches the status names of all versions."""


class JobStatus(StrEnum):
    DELAYED = "delayed"
    """It waits for its `not_before_ms`, or for the end of the pause after a step that failed."""
    QUEUED = "queued"
    """It waits in the stream: not begun, or released by a worker that stopped. Its log is kept."""
    RUNNING = "running"
    """A worker holds the lease, under the attempt number in the job's hash."""
    FINISHED = "finished"
    """All tokens are in the log; `finish_reason` is `stop`, `tool_calls` or `length`."""
    FAILED = "failed"
    """It cannot run, or failed. `error` in the terminal event says why."""
    CANCELLED = "cancelled"
    """A client cancelled it. The tokens generated until then are in the log."""
    EXPIRED = "expired"
    """Its deadline passed. The tokens generated until then are in the log."""

    @property
    def terminal(self) -> bool:
        return self not in (JobStatus.DELAYED, JobStatus.QUEUED, JobStatus.RUNNING)


def read_status(job_id: str, raw: bytes) -> JobStatus:
    """Decode the status in a job's record. Raises the error of `unknown_status` if this version lacks it."""
    status = read_any_status(job_id, raw)
    if not isinstance(status, JobStatus):
        raise unknown_status(job_id, status)
    return status


def read_any_status(job_id: str, raw: bytes) -> JobStatus | str:
    """Decode the status in a job's record. A plain `str` is one of a newer version. Raises BadRecord."""
    text = raw.decode(errors="replace")
    try:
        return JobStatus(text)
    except ValueError:
        if not STATUS_NAME.fullmatch(text):
            raise unknown_status(job_id, text) from None
        return text


def unknown_status(job_id: str, status: str) -> BadRecord:
    """Return UnknownStatus, or BadRecord if no version can have such a status."""
    kind = UnknownStatus if STATUS_NAME.fullmatch(status) else BadRecord
    return kind(
        f"job {job_id[:128]!r} has the status {status[:50]!r}, which this version of ingine does not know: "
        "upgrade the client"
    )


def read_number(job_id: str, name: str, raw: bytes | None) -> int | None:
    """Decode a number in a job's record. Returns None for None. Raises BadRecord if it is no number."""
    if raw is None:
        return None
    text = raw.decode(errors="replace")
    if text.isascii() and text.isdigit() and len(text) < 20:
        return int(text)
    raise BadRecord(f"the record of job {job_id} is damaged: its field {name} is {text[:50]!r}, no number")
