"""Ids of jobs, which are the ids of answers, and positions in their streams.

The id of a job names its kind and its owner, so a gateway needs no state to refuse a stranger's.
"""

import hashlib
import re
import secrets

from starlette.requests import Request

from ingine.contract.keys import log_id
from ingine.errors import JobNotFound
from ingine.gateway.access import OWNER_CHARS, Caller
from ingine.gateway.errors import Refused

CHAT, COMPLETION, RESPONSE = "chatcmpl-", "cmpl-", "resp_"
RANDOM_CHARS = 32 - OWNER_CHARS
IDEMPOTENCY_KEY = "idempotency-key"
MAX_IDEMPOTENCY_KEY = 256
_POSITION = re.compile(r"(.{1,128})/(\d{1,15})-([01])", re.ASCII)


def new_id(kind: str, caller: Caller, idempotency_key: str | None = None) -> str:
    """Return the id of a new job: its kind, its owner, and 80 bits that are random or follow from the key.

    Raises Refused for a key of the wrong length.
    """
    if idempotency_key is None:
        return f"{kind}{caller.owner}{secrets.token_hex(RANDOM_CHARS // 2)}"
    if not 1 <= len(idempotency_key) <= MAX_IDEMPOTENCY_KEY:
        message = f"an Idempotency-Key has 1 to {MAX_IDEMPOTENCY_KEY} characters"
        raise Refused(400, "invalid_idempotency_key", message)
    digest = hashlib.sha256(f"{caller.owner}{kind}{idempotency_key}".encode()).hexdigest()
    return f"{kind}{caller.owner}{digest[:RANDOM_CHARS]}"


def may_return(request: Request) -> bool:
    """Return True if the client may come back for the job: it has a key that finds it again. Such a job is
    not cancelled when the connection ends."""
    return IDEMPOTENCY_KEY in request.headers


def check_owner(job_id: str, kind: str, caller: Caller) -> None:
    """Raise JobNotFound unless it is the id of such a job of this caller."""
    begins = f"{kind}{caller.owner}"
    if not (
        job_id.startswith(begins) and re.fullmatch(rf"[0-9a-f]{{{RANDOM_CHARS}}}", job_id[len(begins) :])
    ):
        raise JobNotFound(f"no job {job_id[:128]!r}: never submitted, or its result's TTL has passed")


def position_id(job_id: str, position: int, *, terminal: bool = False) -> str:
    """Return the value of an SSE `id:` field, after which a client can resume the stream."""
    return f"{job_id}/{log_id(position, terminal=terminal)}"


def read_position(value: str) -> tuple[str, int, bool]:
    """Read `position_id`. Returns the job, the position, and whether it has ended there. Raises Refused."""
    match = _POSITION.fullmatch(value)
    if match is None:
        message = "Last-Event-ID must be the id of an event of this stream"
        raise Refused(400, "invalid_last_event_id", message)
    return match[1], int(match[2]), match[3] == "1"
