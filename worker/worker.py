"""The worker: intake, engine and publisher put together, and how they start and stop."""

import asyncio
import contextlib
import logging
import time

from redis.exceptions import AuthenticationError, RedisError, ResponseError

import ingine
from ingine.engine import Engine
from ingine.errors import ConfigError, EngineError
from ingine.wire import DEFAULT_MAX_JOB_BYTES, GROUP, JobStatus, Keys
from worker.connections import connect, connect_sync, redact
from worker.control import ControlListener, nudge
from worker.engine_thread import EngineFailure, EngineThread, StepMessage
from worker.heartbeat import Heartbeat
from worker.http import HttpServer
from worker.intake import Intake
from worker.jobs import JobTable, RunningJob
from worker.leases import LeaseThread
from worker.logs import log_event
from worker.metrics import Metrics
from worker.prompts import PromptReader
from worker.publisher import Publisher
from worker.queue import CANCELLED, STALE, Queue
from worker.retry import until_served
from worker.settings import WorkerSettings

logger = logging.getLogger(__name__)

HEALTHY_POLL_S = 15.0
"""Without an answer for this long a worker is not healthy: a hung reconnect looks like an idle queue."""

READY_COMMIT_S = 5.0
"""A step that waits for longer than this to be committed: Redis is away, or refuses writes."""


class Worker:
    """One worker on one queue, `await run()` until `stop()` or a fatal error.

    `engine` is given so that it can be built (and fail) before anything touches Redis.
    """

    def __init__(
        self, settings: WorkerSettings, redis_url: str, engine: Engine, *, served_names: frozenset[str]
    ):
        self._settings = settings
        self._url = redis_url
        self._keys = keys = Keys(settings.queue)
        self._redis, self._blocking, self._listening = (connect(redis_url) for _ in range(3))
        self._jobs = JobTable()
        self._metrics = metrics = Metrics()
        self._steps: asyncio.Queue[StepMessage] = asyncio.Queue()
        self._stop_requested = asyncio.Event()
        self._fatal: Exception | None = None
        self._served_names = served_names

        self._engine = EngineThread(engine, self._steps.put_nowait)
        self._queue = Queue(
            keys, settings.worker_id, self._redis, self._blocking, result_ttl_s=settings.result_ttl_s
        )
        self._publisher = Publisher(self._queue, self._jobs, metrics, self._engine.abort)
        self._intake = Intake(
            self._queue,
            self._jobs,
            self._engine,
            self._publisher,
            PromptReader(engine, served_names, log_prompts=settings.log_prompts),
            metrics,
            max_num_jobs=engine.config.max_num_seqs,
            lease_s=settings.lease_s,
            max_deaths=settings.max_deaths,
            expire=self._expire,
        )
        self._leases = LeaseThread(
            connect_sync(redis_url),
            keys,
            settings.worker_id,
            self._jobs,
            lease_s=settings.lease_s,
            answered=lambda job, answer: self._loop.call_soon_threadsafe(self._lease_answered, job, answer),
        )
        self._heartbeat = Heartbeat(
            self._redis, keys, settings.worker_id, metrics, describe=self._describe, learn=self._learn
        )
        self._control = ControlListener(self._listening, keys, self._obey)
        self._http = None
        if settings.http_port >= 0:
            self._http = HttpServer(
                settings.http_host,
                settings.http_port,
                metrics.registry,
                healthy=self._unhealthy,
                ready=self._unready,
            )

    # ------------------------------------------------------------------------------ start and stop

    async def run(self) -> None:
        """Serves until `stop`. Raises EngineError if a part broke; the jobs are handed over all the same."""
        self._loop = asyncio.get_running_loop()
        if self._http:
            self._http.start()
        await until_served("start", self._prepare_queue)
        self._leases.start()
        self._engine.start()
        background = [
            asyncio.create_task(coroutine, name=name)
            for name, coroutine in (
                ("publisher", self._publish()),
                ("control", self._control.run()),
                ("heartbeat", self._heartbeat.run()),
            )
        ]
        intake = asyncio.create_task(self._intake.run(), name="intake")
        self._log_start()
        await self._until_stopped([intake, *background])
        try:
            async with asyncio.timeout(self._settings.drain_timeout_s):
                await self._hand_over(intake)
        except TimeoutError:
            log_event(logger, logging.WARNING, "hand-over timed out", jobs=len(self._jobs))
        await _cancel({intake, *background})
        await self._close()
        if self._fatal:
            raise EngineError(f"the worker stopped: {self._fatal!r}") from self._fatal

    def stop(self) -> None:
        """Begin the hand-over: take no more jobs, finish the step under way, release the rest."""
        self._stop_requested.set()

    @property
    def http_port(self) -> int | None:
        return self._http and self._http.port

    @property
    def stopping(self) -> bool:
        return self._stop_requested.is_set()

    async def _prepare_queue(self) -> None:
        try:
            policy = (await self._redis.config_get("maxmemory-policy")).get("maxmemory-policy", "")
        except AuthenticationError as error:
            raise ConfigError(f"INGINE_REDIS_URL: the server at {redact(self._url)} says: {error}") from None
        except ResponseError:
            policy = ""  # CONFIG is forbidden here, which is a good sign.
        if policy.startswith("allkeys-"):
            raise ConfigError(
                f"the server's maxmemory-policy is {policy}: it would delete jobs and logs. Set noeviction."
            )
        limits = {name: getattr(self._settings, name) for name in ("max_jobs", "max_job_bytes")}
        if limits := {name: value for name, value in limits.items() if value is not None}:
            await self._redis.hset(self._keys.settings, mapping=limits)
        await self._queue.create_groups()
        await self._heartbeat.beat()

    async def _until_stopped(self, running: list[asyncio.Task]) -> None:
        """Until somebody asks, or one of the tasks ends: they never should."""
        asked = asyncio.create_task(self._stop_requested.wait())
        done, _ = await asyncio.wait([asked, *running], return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        for ended in done - {asked}:
            self._fatal = self._fatal or ended.exception() or EngineError(f"{ended.get_name()} ended")
            log_event(logger, logging.ERROR, "worker failed", part=ended.get_name(), error=repr(self._fatal))

    async def _hand_over(self, intake: asyncio.Task) -> None:
        started = time.monotonic()
        log_event(logger, logging.INFO, "worker draining", jobs=len(self._jobs))
        self._intake.stopping = True
        self._intake.room_changed()
        await self._engine.stop()
        await self._steps.join()
        num_released = await self._release_all()
        # Its last read may still have brought something, which it releases, or begins at the same moment.
        await asyncio.wait([intake])
        num_released += await self._release_all()
        await self._heartbeat.leave()
        log_event(
            logger,
            logging.INFO,
            "worker drained",
            released=num_released,
            ms=(time.monotonic() - started) * 1000,
        )

    async def _release_all(self) -> int:
        num_released = 0
        for job in self._jobs:
            self._jobs.remove(job)
            num_released += await self._queue.release(job.entry, job.id, job.attempt)
        await self._redis.publish(self._keys.control, nudge("released"))
        return num_released

    async def _close(self) -> None:
        await asyncio.to_thread(self._leases.stop)
        if self._http:
            await asyncio.to_thread(self._http.stop)
        for client in (self._redis, self._blocking, self._listening):
            with contextlib.suppress(RedisError, OSError):
                await client.aclose()

    # ------------------------------------------------------------------------------------ publish

    async def _publish(self) -> None:
        while True:
            message = await self._steps.get()
            await self._commit(message)
            self._steps.task_done()
            self._metrics.observe_engine(self._engine.stats, len(self._jobs))
            self._intake.room_changed()

    async def _commit(self, message: StepMessage) -> None:
        if isinstance(message, EngineFailure):
            await self._engine_failed(message)
        else:
            await self._publisher.commit(message)
        self._engine.credit()

    async def _engine_failed(self, failure: EngineFailure) -> None:
        """Its jobs go back as if we had died with them: one that breaks every engine ends as failed."""
        self._metrics.engine_failures.inc()
        for job in filter(None, map(self._jobs.by_seq, failure.seq_ids)):
            self._jobs.remove(job)
            await until_served(
                "release",
                lambda: self._queue.release(job.entry, job.id, job.attempt, died=True),  # noqa: B023
            )
        if failure.fatal:
            self._fatal = failure.error
            self.stop()

    # ------------------------------------------------------------------------- what others ask for

    async def _obey(self, command: dict) -> None:
        match command["command"]:
            case "cancel":
                job = self._jobs.by_id(str(command.get("job_id")))
                if job and await self._queue.is_cancelled(job.id):
                    self._publisher.cancel(job)
            case "released":
                await self._intake.sweep()
            case "pause" | "resume" | "drain":
                self._heartbeat.beat_early()

    def _learn(self, settings: dict[str, str]) -> None:
        self._intake.max_job_bytes = int(settings.get("max_job_bytes", DEFAULT_MAX_JOB_BYTES))
        self._intake.paused = settings.get("paused") == "1"
        self._intake.room_changed()
        if settings.get(f"drain:{self._settings.worker_id}") == "1":
            self.stop()

    def _lease_answered(self, job: RunningJob, answer: int) -> None:
        if self._jobs.by_seq(job.seq_id) is not job:
            return
        if answer == STALE:
            self._publisher.drop(job)
        elif answer == CANCELLED:
            self._publisher.cancel(job)

    def _expire(self, job: RunningJob) -> None:
        if job.ending is None:
            job.ending = JobStatus.EXPIRED
            self._engine.abort(job.seq_id)

    # ------------------------------------------------------------------------------ what we say

    @property
    def _state(self) -> str:
        if self.stopping:
            return "draining"
        return "paused" if self._intake.paused else "serving"

    def _describe(self) -> dict:
        stats = self._engine.stats
        return {
            "state": self._state,
            "model": min(self._served_names, key=len),
            "version": ingine.__version__,
            "num_jobs": len(self._jobs),
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "kv_usage": round(stats.kv_usage, 4),
        }

    def _unhealthy(self) -> str | None:
        if not self._engine.alive:
            return "the engine's thread is not running"
        silent_s = time.monotonic() - self._intake.last_poll
        if silent_s > HEALTHY_POLL_S:
            return f"Redis has not answered for {silent_s:.0f} s"
        return None

    def _unready(self) -> str | None:
        if fault := self._unhealthy():
            return fault
        since = self._publisher.waiting_since
        if since is not None and (waiting_s := time.monotonic() - since) > READY_COMMIT_S:
            return f"Redis has not taken a step's tokens for {waiting_s:.0f} s"
        return None if self._state == "serving" else f"the worker is {self._state}"

    def _log_start(self) -> None:
        log_event(
            logger,
            logging.INFO,
            "worker ready",
            worker=self._settings.worker_id,
            queue=self._settings.queue,
            redis=redact(self._url),
            model=min(self._served_names, key=len),
            group=GROUP,
            http=self._http and f"{self._settings.http_host}:{self.http_port}",
        )


async def _cancel(running: set[asyncio.Task]) -> None:
    """Until all have ended. Asks again, since a library may swallow one that comes with a reply."""
    while running:
        for each in running:
            each.cancel()
        _, running = await asyncio.wait(running, timeout=1.0)
