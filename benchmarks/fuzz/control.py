"""Fuzz messages on a control channel: they make a worker read earlier what it reads anyway, or do nothing."""

from random import Random
from types import SimpleNamespace
from typing import Any

from benchmarks.fuzz.mutations import packed_case
from benchmarks.fuzz.running import finished
from ingine.worker.control import COMMANDS, ControlListener
from ingine.worker.partition import Partition

NUDGES = (
    {"command": "cancel", "job_id": "a"}, {"command": "released"}, {"command": "pause"},
    {"command": "resume"}, {"command": "drain", "worker": "w-1"},
)  # fmt: skip


def cases(rng: Random) -> bytes:
    return packed_case(rng, rng.choice(NUDGES))


def check(case: bytes) -> str:
    done: list[str] = []
    partition = _partition(done)
    listener = ControlListener(None, None, runs=lambda job_id: job_id == "a", obey=partition._obey)
    listener._receive(case)
    assert listener._commands <= COMMANDS and listener._cancelled <= {"a"}
    assert listener._nudged.is_set() == bool(listener._commands or listener._cancelled)
    finished(partition._obey(listener._commands, listener._cancelled))
    assert len(done) <= 1
    return done[0] if done else "ignored"


def _partition(done: list[str]) -> Any:
    """A partition with one job, `a`, whose cancellation was requested."""

    async def cancelled_among(job_ids: set[str]) -> list[str]:
        return [job_id for job_id in job_ids if job_id == "a"]

    job = SimpleNamespace(id="a")
    partition: Any = object.__new__(Partition)
    partition._jobs = SimpleNamespace(by_id=lambda job_id: job if job_id == "a" else None)
    partition.queue = SimpleNamespace(cancelled_among=cancelled_among)
    partition._publisher = SimpleNamespace(cancel=lambda job: done.append("cancelled"))
    partition.intake = SimpleNamespace(sweep_soon=lambda: done.append("swept"))
    partition.heartbeat = SimpleNamespace(beat_early=lambda: done.append("beaten"))
    return partition
