"""One partition of the queue, and what a worker runs for it."""

import math
from collections.abc import Callable, Coroutine

from redis.asyncio import Redis

from ingine.wire import DEFAULT_MAX_JOB_BYTES
from worker.admission import Admission
from worker.control import ControlListener
from worker.heartbeat import Heartbeat
from worker.intake import Intake
from worker.jobs import JobTable
from worker.metrics import Metrics
from worker.publisher import Publisher
from worker.queue import Queue


class Partition:
    """`stop(reason)` ends the worker: told to drain (no reason), or of no use any more."""

    def __init__(
        self,
        queue: Queue,
        redis: Redis,
        admission: Admission,
        jobs: JobTable,
        publisher: Publisher,
        metrics: Metrics,
        *,
        num_partitions: int,
        lease_s: float,
        describe: Callable[[], dict],
        stop: Callable[[str | None], None],
    ):
        self.queue = queue
        self._jobs = jobs
        self._publisher = publisher
        self._num_partitions = num_partitions
        self._stop = stop
        self.intake = Intake(queue, admission, lease_s=lease_s, num_partitions=num_partitions)
        self.heartbeat = Heartbeat(
            redis, queue.keys, queue.worker_id, metrics, describe=describe, learn=self._learn
        )
        self._control = ControlListener(redis, queue.keys, self._obey)

    def parts(self) -> dict[str, Coroutine]:
        """What runs for as long as the worker does, beside the intake."""
        name = self.queue.keys.prefix
        return {f"control of {name}": self._control.run(), f"heartbeat of {name}": self.heartbeat.run()}

    async def _obey(self, command: dict) -> None:
        match command["command"]:
            case "cancel":
                job = self._jobs.by_id(str(command.get("job_id")))
                if job and await self.queue.is_cancelled(job.id):
                    self._publisher.cancel(job)
            case "released":
                self.intake.sweep_soon()
            case "pause" | "resume" | "drain":
                self.heartbeat.beat_early()

    def _learn(self, settings: dict[str, str]) -> None:
        self.intake.max_job_bytes = int(_number(settings.get("max_job_bytes"), DEFAULT_MAX_JOB_BYTES))
        self.queue.weights = {
            name.removeprefix("weight:"): _number(weight, 1.0)
            for name, weight in settings.items()
            if name.startswith("weight:")
        }
        self.intake.paused = settings.get("paused") == "1"
        self.intake.wake()
        if (number := settings.get("partitions", "1")) != str(self._num_partitions):
            self._stop(f"the queue has {number} partitions now, not {self._num_partitions}: start again")
        elif settings.get(f"drain:{self.queue.worker_id}") == "1":
            self._stop(None)


def _number(text: str | None, default: float) -> float:
    """Anybody may write there: what is no positive number counts as not set."""
    try:
        number = float(text or "")
    except ValueError:
        return default
    return number if 0 < number < math.inf else default
