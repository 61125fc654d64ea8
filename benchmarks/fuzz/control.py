"""Messages on a control channel, as a worker obeys them."""

from random import Random
from types import SimpleNamespace
from typing import Any

from benchmarks.fuzz.mutations import packed_case
from benchmarks.fuzz.running import finished
from worker.control import ControlListener
from worker.partition import Partition

COMMANDS = (
    {"command": "cancel", "job_id": "a"}, {"command": "released"}, {"command": "pause"},
    {"command": "resume"}, {"command": "drain", "worker": "w-1"},
)  # fmt: skip


def cases(rng: Random) -> bytes:
    return packed_case(rng, rng.choice(COMMANDS))


def check(case: bytes) -> str:
    done: list[str] = []
    partition = _partition(done)
    finished(ControlListener(None, None, partition._obey)._receive(case))
    assert len(done) <= 1
    return done[0] if done else "ignored"


def _partition(done: list[str]) -> Any:
    """Its only job is `a`, which somebody has asked to cancel."""

    async def is_cancelled(job_id: str) -> bool:
        return job_id == "a"

    job = SimpleNamespace(id="a")
    partition: Any = object.__new__(Partition)
    partition._jobs = SimpleNamespace(by_id=lambda job_id: job if job_id == "a" else None)
    partition.queue = SimpleNamespace(is_cancelled=is_cancelled)
    partition._publisher = SimpleNamespace(cancel=lambda job: done.append("cancelled"))
    partition.intake = SimpleNamespace(sweep_soon=lambda: done.append("swept"))
    partition.heartbeat = SimpleNamespace(beat_early=lambda: done.append("beaten"))
    return partition
