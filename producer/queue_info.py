"""The state of a queue: one transaction reads each partition, and the answers are added up."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import msgpack
from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from ingine.contract.faults import MAX_NESTING, deeper_than
from ingine.contract.jobs import DEFAULT_MAX_JOB_BYTES, DEFAULT_MAX_QUEUED_BYTES, DEFAULT_MAX_QUEUED_JOBS
from ingine.contract.keys import GROUP, SILENT_AFTER_S, Keys, Priority, is_worker
from ingine.errors import ClientError
from ingine.producer.results import QueueInfo, is_serving

LOST_AFTER_S = 30
"""A worker silent for longer is lost: twice the default lease, so others have its jobs by then, if any are
alive."""


@dataclass(frozen=True, slots=True)
class PartitionInfo:
    """The state of one partition. Fields have the same meaning as in `QueueInfo`."""

    waiting: dict[str, int]
    running: dict[str, int]
    num_delayed: int
    num_bytes: int
    settings: dict[str, str]
    workers: dict[str, dict[str, Any]]
    num_dead: int


async def read_partition(redis: Redis, keys: Keys) -> PartitionInfo:
    pipeline = redis.pipeline(transaction=True)
    for jobs in keys.all_jobs:
        pipeline.xlen(jobs)
        pipeline.xpending(jobs, GROUP)
    pipeline.zcard(keys.delayed)
    pipeline.get(keys.bytes)
    pipeline.hgetall(keys.settings)
    pipeline.hgetall(keys.workers)
    pipeline.xlen(keys.dead)
    pipeline.time()
    answers = await pipeline.execute(raise_on_error=False)
    for answer in answers:
        if isinstance(answer, RedisError) and not _is_no_group(answer):
            raise answer
    *streams, num_delayed, num_bytes, settings, workers, num_dead, (now_s, _) = answers
    waiting, running = {}, {}
    for priority, num_entries, pending in zip(Priority, streams[::2], streams[1::2], strict=True):
        running[str(priority)] = _num_running(pending)
        waiting[str(priority)] = num_entries - running[str(priority)]
    return PartitionInfo(
        waiting=waiting,
        running=running,
        num_delayed=num_delayed,
        num_bytes=int(_number({"bytes": text(num_bytes or b"0")}, "bytes")),
        settings={text(name): text(value) for name, value in settings.items()},
        workers={text(name): read_heartbeat(raw, now_s) for name, raw in workers.items()},
        num_dead=num_dead,
    )


def merge(queue: str, partitions: Sequence[PartitionInfo]) -> QueueInfo:
    """Add partitions up. A switch is on if any partition has it on; limits are the first partition's."""
    settings = partitions[0].settings
    workers: dict[str, dict[str, Any]] = {}
    for partition in partitions:
        for name, heartbeat in partition.workers.items():
            if name not in workers or heartbeat["silent_s"] < workers[name]["silent_s"]:
                workers[name] = heartbeat
    return QueueInfo(
        queue=queue,
        num_partitions=len(partitions),
        waiting=_sums([partition.waiting for partition in partitions]),
        running=_sums([partition.running for partition in partitions]),
        num_delayed=sum(partition.num_delayed for partition in partitions),
        num_bytes=sum(partition.num_bytes for partition in partitions),
        max_jobs=int(_number(settings, "max_jobs", DEFAULT_MAX_QUEUED_JOBS)),
        max_bytes=int(_number(settings, "max_bytes", DEFAULT_MAX_QUEUED_BYTES)),
        max_job_bytes=int(_number(settings, "max_job_bytes", DEFAULT_MAX_JOB_BYTES)),
        max_jobs_per_s=_number(settings, "max_jobs_per_s", 0) or None,
        weights={
            tenant: _number(settings, f"weight:{tenant}") for tenant in _with_prefix(settings, "weight:")
        },
        paused=any(partition.settings.get("paused") == "1" for partition in partitions),
        draining=sorted(set().union(*(_with_prefix(p.settings, "drain:") for p in partitions))),
        workers=workers,
        num_dead=sum(partition.num_dead for partition in partitions),
    )


def _number(settings: dict[str, str], name: str, default: float = 1.0) -> float:
    """Read a number. Raises ClientError if it is not one, since any client may have written it."""
    with suppress(ValueError):
        if math.isfinite(number := float(settings.get(name, default))):
            return number
    raise ClientError(f"the queue's setting {name[:150]} is {settings[name][:50]!r}, which is no number")


def text(raw: bytes) -> str:
    """Decode what any client may have written, replacing invalid UTF-8."""
    return raw.decode(errors="replace")


def _sums(counts: Sequence[dict[str, int]]) -> dict[str, int]:
    return {name: sum(count[name] for count in counts) for name in counts[0]}


def _with_prefix(settings: dict[str, str], prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): value for name, value in settings.items() if name.startswith(prefix)}


def _is_no_group(error: RedisError) -> bool:
    """True if the stream has no group, since no worker has ever read it."""
    return isinstance(error, ResponseError) and str(error).startswith("NOGROUP")


def _num_running(pending: dict | ResponseError) -> int:
    if isinstance(pending, ResponseError):
        return 0
    return sum(consumer["pending"] for consumer in pending["consumers"] if is_worker(text(consumer["name"])))


def read_heartbeat(raw: bytes, now_s: int) -> dict[str, Any]:
    """Decode a heartbeat, as in `QueueInfo.workers`. An invalid one counts as silent since 1970.

    Any client may have written it: values that JSON lacks, and too deep a nesting, make it invalid.
    """
    try:
        fields = msgpack.unpackb(raw)
        json.dumps(fields, allow_nan=False)
        if deeper_than(fields, MAX_NESTING):
            raise ValueError("nested too deep")
        fields |= {"silent_s": now_s - fields["at_s"]}
    except (ValueError, TypeError, KeyError, RecursionError):
        fields = {"silent_s": now_s}
    if fields["silent_s"] > SILENT_AFTER_S:
        fields["state"] = "lost" if fields["silent_s"] > LOST_AFTER_S else "silent"
    return fields


async def num_serving(redis: Redis, keys: Keys) -> int:
    """Count the workers that serve a partition, as `QueueInfo.num_serving` does."""
    pipeline = redis.pipeline(transaction=False)
    heartbeats, (now_s, _) = await pipeline.hgetall(keys.workers).time().execute()
    return sum(is_serving(read_heartbeat(raw, now_s)) for raw in heartbeats.values())
