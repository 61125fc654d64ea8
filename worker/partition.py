"""One partition of the queue, and the tasks that a worker runs for it."""

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Coroutine

from redis.asyncio import Redis
from redis.exceptions import ResponseError

from ingine.contract.jobs import DEFAULT_MAX_JOB_BYTES, MAX_JOB_BYTES
from ingine.contract.keys import Keys, read_num_partitions
from ingine.errors import EngineError
from ingine.worker.admission import Admission
from ingine.worker.control import ControlListener
from ingine.worker.heartbeat import INTERVAL_S, Heartbeat
from ingine.worker.intake import Intake
from ingine.worker.jobs import JobTable
from ingine.worker.metrics import Metrics
from ingine.worker.publisher import Publisher
from ingine.worker.queue import Queue
from ingine.worker.retry import until_served


class Partition:
    """A partition's queue, intake, heartbeat and control channel.

    `describe()` returns the content of the worker's heartbeat. `stop()` begins the worker's hand-over, when
    the partition's settings ask the worker to drain.
    """

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
        stop: Callable[[], None],
    ):
        self.queue = queue
        self._jobs = jobs
        self._publisher = publisher
        self._stop = stop
        self.intake = Intake(queue, admission, lease_s=lease_s, num_partitions=num_partitions)
        self.heartbeat = Heartbeat(
            redis,
            queue.keys,
            queue.worker_id,
            queue.model,
            metrics,
            num_partitions=num_partitions,
            describe=describe,
            learn=self._learn,
            learn_models=self._learn_models,
        )
        self._control = ControlListener(
            redis, queue.keys, runs=lambda job_id: jobs.by_id(job_id) is not None, obey=self._obey
        )
        self.ready = asyncio.Event()
        """Set once its server is checked and the queue is set up there."""

    @property
    def name(self) -> str:
        return self.queue.keys.prefix

    def parts(self) -> dict[str, Coroutine]:
        """The tasks, by name, that run beside the intake once the partition is ready."""
        parts = {"control": self._control.run, "heartbeat": self.heartbeat.run}
        return {f"{part} of {self.name}": self._once_ready(run) for part, run in parts.items()}

    async def _once_ready(self, run: Callable[[], Awaitable[None]]) -> None:
        await self.ready.wait()
        await run()

    async def _obey(self, commands: set[str], cancelled: set[str]) -> None:
        """Read at once the keys that nudges are about."""
        if "released" in commands:
            self.intake.sweep_soon()
        if commands & {"pause", "resume", "drain"}:
            self.heartbeat.beat_early()
        if cancelled:
            for job_id in await self.queue.cancelled_among(cancelled):
                if job := self._jobs.by_id(job_id):
                    self._publisher.cancel(job)

    def _learn(self, settings: dict[str, str]) -> None:
        limit = int(_number(settings.get("max_job_bytes"), DEFAULT_MAX_JOB_BYTES))
        self.intake.max_job_bytes = min(limit, MAX_JOB_BYTES)
        self.queue.weights = {
            name.removeprefix("weight:"): _number(weight, 1.0)
            for name, weight in settings.items()
            if name.startswith("weight:")
        }
        self.intake.paused = settings.get("paused") == "1"
        self.intake.wake()
        if settings.get(f"drain:{self.queue.worker_id}") == "1":
            self._stop()

    def _learn_models(self, silent_s: dict[str, float]) -> None:
        queue = self.queue
        lately = {model for model, seconds in silent_s.items() if seconds < queue.model_wait_s}
        queue.served_elsewhere = frozenset(lately.difference(queue.model.aliases))


async def watch_number(redis: Redis, queue: str, number: int) -> None:
    """Raise EngineError once the queue has another number of partitions.

    Only the number in the queue's own settings hash counts, which is written last. The number in a
    partition's settings hash only keeps producers away from the partition: its jobs go on running, since the
    change may still be refused, or was interrupted.
    """
    settings = Keys(queue).settings

    async def ask() -> bytes | None:
        # A server that came back empty has lost the number: write it again.
        await redis.hsetnx(settings, "partitions", number)
        return await redis.hget(settings, "partitions")

    while True:
        # Any client may write there: ignore a value that is no number, and a key that is no hash.
        with contextlib.suppress(ValueError, ResponseError):
            field = await until_served("asking for partitions", ask)
            if (now := read_num_partitions(field)) != number:
                raise EngineError(f"the queue has {now} partitions now, not {number}: restart the worker")
        await asyncio.sleep(INTERVAL_S)


def _number(text: str | None, default: float) -> float:
    """The number in `text`, or `default` unless it is positive and finite: any client may write there."""
    try:
        number = float(text or "")
    except ValueError:
        return default
    return number if 0 < number < math.inf else default
