"""A job's record, the hash under `Keys.job`: in which states a job can be, and how its fields are read.

Anybody may have written there, so nothing in it is taken for granted.
"""

import re
from enum import StrEnum

from ingine.errors import BadRecord, UnknownStatus

STATUS_NAME = re.compile(r"[a-z_]{1,32}")
"""What a status of any version looks like."""


class JobStatus(StrEnum):
    DELAYED = "delayed"
    """Its time has not come: `not_before_ms`, or the pause after a step that failed under it."""
    QUEUED = "queued"
    """In the stream: not begun, or handed over by a worker that stopped; its log is kept."""
    RUNNING = "running"
    """A worker holds the lease, under the attempt number in the job's hash."""
    FINISHED = "finished"
    """All tokens are in the log; `finish_reason` is `stop` or `length`."""
    FAILED = "failed"
    """It cannot be run, or could not; `error` in the terminal event says why."""
    CANCELLED = "cancelled"
    """Somebody cancelled it. The tokens made until then are in the log."""
    EXPIRED = "expired"
    """Its deadline passed first. The tokens made until then are in the log."""

    @property
    def terminal(self) -> bool:
        return self not in (JobStatus.DELAYED, JobStatus.QUEUED, JobStatus.RUNNING)


def read_status(job_id: str, raw: bytes) -> JobStatus:
    """From a job's record. Raises BadRecord, as `unknown_status` has it."""
    status = read_any_status(job_id, raw)
    if not isinstance(status, JobStatus):
        raise unknown_status(job_id, status)
    return status


def read_any_status(job_id: str, raw: bytes) -> JobStatus | str:
    """From a job's record. A plain `str` may be a newer version's. Raises BadRecord for what is nobody's."""
    text = raw.decode(errors="replace")
    try:
        return JobStatus(text)
    except ValueError:
        if not STATUS_NAME.fullmatch(text):
            raise unknown_status(job_id, text) from None
        return text


def unknown_status(job_id: str, status: str) -> BadRecord:
    """UnknownStatus, unless no version has such a status."""
    kind = UnknownStatus if STATUS_NAME.fullmatch(status) else BadRecord
    return kind(
        f"job {job_id[:128]!r} has the status {status[:50]!r}, which this version of ingine does not know: "
        "upgrade the client"
    )


def read_number(job_id: str, name: str, raw: bytes | None) -> int | None:
    """From a job's record. Raises BadRecord for what is none."""
    if raw is None:
        return None
    text = raw.decode(errors="replace")
    if text.isascii() and text.isdigit() and len(text) < 20:
        return int(text)
    raise BadRecord(f"the record of job {job_id} is damaged: its field {name} is {text[:50]!r}, no number")
