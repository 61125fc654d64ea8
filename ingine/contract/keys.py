"""Every Redis key of a queue, and in which partition a job lives.

Needs nothing but the standard library. The rest of the contract is in `jobs`, `events`, `record` and
`control` beside it.
"""

import re
import zlib
from dataclasses import dataclass
from enum import StrEnum

GROUP = "workers"
"""The one consumer group of every jobs stream, created at 0."""

WAITING, RELEASED = "waiting", "released"
"""Consumers of that group which are no workers: for entries in the fair order, and for released entries."""

SILENT_AFTER_S = 5
"""A worker whose last heartbeat is older counts as dead, or hung. A live worker beats each second."""

PARKED_PREFIX = "parked:"
"""Prefix of further consumers that are no workers: for entries that wait for workers of another model."""

JOB_FIELD, EVENT_FIELD = "job", "event"
"""The field of a jobs stream's entry that holds the job, and the only field of a token log's entry."""

MAX_PARTITIONS = 64
QUEUE_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Priority(StrEnum):
    """The jobs stream that a job waits in. Strict order, but for ageing, so that `low` does not starve."""

    HIGH = "high"
    NORMAL = "normal"
    LOW = "low"


@dataclass(frozen=True)
class Keys:
    """Every Redis key of one partition. All have its hash tag, so one script may touch any of them.

    | key                          | type    | holds
    | ---------------------------- | ------- | -----
    | ingine:{q}:jobs:<priority>   | stream  | jobs that wait or run; msgpack job, tenant, cost, choices
    | ingine:{q}:fair:<priority>   | zset    | entries that wait -> virtual start, see scripts/take.lua
    | ingine:{q}:ends:<priority>   | zset    | tenants ahead in virtual time -> how far, and the present in it
    | ingine:{q}:aside:<priority>  | stream  | entries that had the last ids there are, see worker/last_ids.py
    | ingine:{q}:delayed           | zset    | job id -> due time in ms; such a job is in no stream
    | ingine:{q}:deadlines         | zset    | job id -> when its deadline is to be looked at, in ms
    | ingine:{q}:job:<id>          | hash    | the job's record: status, attempt, position, cancel, times ...
    | ingine:{q}:tokens:<id>       | stream  | the token log: `<n>-0` tokens up to n, `<n>-1` terminal event
    | ingine:{q}:channel:<id>      | channel | the same events, live (sharded pub/sub)
    | ingine:{q}:replies:<name>    | stream  | terminal events of the jobs that named it as `reply_to`
    | ingine:{q}:dead              | stream  | entries that could not run: raw bytes, code, reason, deliveries
    | ingine:{q}:idem:<key>        | string  | idempotency key -> job id, for as long as that job's record
    | ingine:{q}:rate:<tenant>     | string  | when the tenant's next job may come (GCRA), with a TTL
    | ingine:{q}:bytes             | string  | bytes of the submitted jobs that wait or run; absent: 0
    | ingine:{q}:workers           | hash    | worker id -> msgpack heartbeat
    | ingine:{q}:models            | hash    | model name or fingerprint -> when a worker last served it, in s
    | ingine:{q}:queue             | hash    | limits, switches, `partitions`, `weight:<tenant>`
    | ingine:{q}:control           | channel | nudges to workers (sharded); the truth is always in a key

    `{q}` is the queue's name, plus `.<partition>` where the queue has more than one.
    """

    queue: str = "default"
    partition: int | None = None
    """None: the queue has only one partition."""

    def __post_init__(self):
        if not QUEUE_NAME.fullmatch(self.queue):
            # The message does not quote the name, which may be a URL by mistake.
            raise ValueError(f"a queue's name matches {QUEUE_NAME.pattern}")

    @property
    def prefix(self) -> str:
        suffix = "" if self.partition is None else f".{self.partition}"
        return f"ingine:{{{self.queue}{suffix}}}"

    def jobs(self, priority: Priority | str) -> str:
        return f"{self.prefix}:jobs:{Priority(priority)}"

    def while_renumbered(self, priority: Priority | str) -> str:
        """The temporary key of a jobs stream that is rebuilt. It exists only within scripts/renumber.lua."""
        return f"{self.jobs(priority)}:old"

    def set_aside(self, priority: Priority | str) -> str:
        return f"{self.prefix}:aside:{Priority(priority)}"

    @property
    def all_jobs(self) -> list[str]:
        """The three jobs streams, most urgent first."""
        return [self.jobs(priority) for priority in Priority]

    def fair(self, priority: Priority | str) -> str:
        return f"{self.prefix}:fair:{Priority(priority)}"

    def ends(self, priority: Priority | str) -> str:
        return f"{self.prefix}:ends:{Priority(priority)}"

    def job(self, job_id: str) -> str:
        return f"{self.prefix}:job:{job_id}"

    def tokens(self, job_id: str) -> str:
        return f"{self.prefix}:tokens:{job_id}"

    def channel(self, job_id: str) -> str:
        return f"{self.prefix}:channel:{job_id}"

    def replies(self, name: str) -> str:
        return f"{self.prefix}:replies:{name}"

    def idem(self, key: str) -> str:
        return f"{self.prefix}:idem:{key}"

    def rate(self, tenant: str) -> str:
        return f"{self.prefix}:rate:{tenant}"

    @property
    def delayed(self) -> str:
        return f"{self.prefix}:delayed"

    @property
    def deadlines(self) -> str:
        return f"{self.prefix}:deadlines"

    @property
    def bytes(self) -> str:
        return f"{self.prefix}:bytes"

    @property
    def dead(self) -> str:
        return f"{self.prefix}:dead"

    @property
    def workers(self) -> str:
        return f"{self.prefix}:workers"

    @property
    def models(self) -> str:
        return f"{self.prefix}:models"

    @property
    def settings(self) -> str:
        return f"{self.prefix}:queue"

    @property
    def control(self) -> str:
        return f"{self.prefix}:control"


def parked(model: str) -> str:
    """Return the consumer of entries that are parked for workers of `model`, a name or a fingerprint."""
    return PARKED_PREFIX + model


def is_worker(consumer: str) -> bool:
    """Return True if a consumer is a worker. No worker runs the entries of the other consumers."""
    return consumer not in (WAITING, RELEASED) and not consumer.startswith(PARKED_PREFIX)


def read_num_partitions(field: bytes | None) -> int:
    """Decode a queue's field `partitions`. Raises ValueError, since any client may have written it."""
    text = (field or b"1").decode(errors="replace")
    if not (text.isdecimal() and len(text) < 5 and 1 <= int(text) <= MAX_PARTITIONS):
        raise ValueError(
            f"the queue's field `partitions` is {text[:50]!r}, not a number from 1 to {MAX_PARTITIONS}"
        )
    return int(text)


def partition_of(job_id: str, num_partitions: int) -> int:
    """Return a job's partition. Producers, workers and consumers in every language must compute the same."""
    return zlib.crc32(job_id.encode()) % num_partitions


def all_partitions(queue: str, num_partitions: int) -> list[Keys]:
    """Return the keys of each partition. The tag of a queue with only one is its bare name."""
    return [Keys(queue)] if num_partitions == 1 else [Keys(queue, n) for n in range(num_partitions)]


def keys_of(queue: str, job_id: str, num_partitions: int) -> Keys:
    """Return the keys of the partition of a job."""
    return all_partitions(queue, num_partitions)[partition_of(job_id, num_partitions)]


def log_id(position: int, *, terminal: bool = False) -> str:
    """Return the id of the log entry that ends at `position`. Redis refuses a second entry with that id."""
    return f"{position}-{int(terminal)}"
