"""The worker: intake, engine and publisher put together, and how they start and stop."""

import asyncio
import contextlib
import logging
from pathlib import Path

from redis.exceptions import RedisError

import ingine
from ingine.errors import EngineError, InvalidRequest
from ingine.wire import DEFAULT_MAX_JOB_BYTES, GROUP, JobStatus, Keys
from worker.connections import connect, connect_sync, redact
from worker.control import ControlListener
from worker.engine_thread import EngineFailure, EngineThread, StepMessage
from worker.hand_over import HandOver, cancel_all
from worker.health import Health
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
from worker.startup import check_server, set_limits

logger = logging.getLogger(__name__)


class Worker:
    """One worker on one queue, `await run()` until `stop()` or a fatal error.

    `engine` is given, so that it is built (or fails) before anything touches Redis.
    """

    def __init__(
        self, settings: WorkerSettings, redis_url: str, engine: EngineThread, *, served_names: frozenset[str]
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
        self._model_name = Path(max(served_names, key=len)).name

        self._engine = engine
        self._queue = Queue(
            keys, settings.worker_id, self._redis, self._blocking, result_ttl_s=settings.result_ttl_s
        )
        self._publisher = Publisher(self._queue, self._jobs, metrics, self._engine.abort)
        self._intake = Intake(
            self._queue,
            self._jobs,
            self._engine,
            self._publisher,
            PromptReader(engine.engine, served_names, log_prompts=settings.log_prompts),
            metrics,
            max_num_jobs=engine.engine.config.max_num_seqs,
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
        self._hand_over = HandOver(
            self._engine,
            self._steps,
            self._queue,
            self._jobs,
            self._intake,
            self._heartbeat,
            limit_s=settings.drain_timeout_s,
        )
        self._control = ControlListener(self._listening, keys, self._obey)
        self._health = Health(self._engine, self._intake, self._publisher, lambda: self._state)
        self._http = None
        if settings.http_port >= 0:
            self._http = HttpServer(
                settings.http_host,
                settings.http_port,
                metrics.registry,
                healthy=self._health.unhealthy,
                ready=self._health.unready,
            )

    # ------------------------------------------------------------------------------ start and stop

    async def run(self) -> None:
        """Serves until `stop`. Raises EngineError if a part broke; the jobs are handed over all the same."""
        self._loop = asyncio.get_running_loop()
        if self._http:
            self._http.start()
        try:
            if await self._prepared():
                await self._serve()
        finally:
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

    async def _prepared(self) -> bool:
        """Waits for Redis. False if told to stop first."""
        preparing = asyncio.create_task(until_served("start", self._prepare))
        asked = asyncio.create_task(self._stop_requested.wait())
        await asyncio.wait({preparing, asked}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if not preparing.done():
            await cancel_all({preparing})
            return False
        await preparing
        return True

    async def _prepare(self) -> None:
        await check_server(self._redis, self._url)
        await set_limits(self._redis, self._keys, self._settings)
        await self._queue.create_groups()
        await self._heartbeat.beat()

    async def _serve(self) -> None:
        self._leases.start()
        self._engine.start(self._steps.put_nowait)
        parts = {
            "intake": self._intake.run(),
            "publisher": self._publish(),
            "control": self._control.run(),
            "heartbeat": self._heartbeat.run(),
        }
        running = {name: asyncio.create_task(part, name=name) for name, part in parts.items()}
        self._log_start()
        await self._until_stopped(set(running.values()))
        try:
            await self._hand_over.run(**running)
        finally:
            await cancel_all(set(running.values()))

    async def _until_stopped(self, running: set[asyncio.Task]) -> None:
        """Until somebody asks, or one of the tasks ends: they never should."""
        asked = asyncio.create_task(self._stop_requested.wait())
        done, _ = await asyncio.wait({asked, *running}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        for ended in done - {asked}:
            self._fatal = self._fatal or ended.exception() or EngineError(f"{ended.get_name()} ended")
            log_event(logger, logging.ERROR, "worker failed", part=ended.get_name(), error=repr(self._fatal))

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
            self._intake.wake()

    async def _commit(self, message: StepMessage) -> None:
        if isinstance(message, EngineFailure):
            await self._engine_failed(message)
        else:
            await self._publisher.commit(message)
        self._engine.credit()

    async def _engine_failed(self, failure: EngineFailure) -> None:
        """Jobs go back as if we had died with them: one that breaks every engine ends as failed."""
        self._metrics.engine_failures.inc()
        for job in filter(None, map(self._jobs.by_seq, failure.seq_ids)):
            if isinstance(failure.error, InvalidRequest):
                await self._publisher.refuse(job, failure.error)
            else:
                await self._hand_over.release(job, died=True)
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
                self._intake.sweep_soon()
            case "pause" | "resume" | "drain":
                self._heartbeat.beat_early()

    def _learn(self, settings: dict[str, str]) -> None:
        try:
            self._intake.max_job_bytes = int(settings.get("max_job_bytes", DEFAULT_MAX_JOB_BYTES))
        except ValueError:  # anybody may write there: what is no number is no limit
            self._intake.max_job_bytes = DEFAULT_MAX_JOB_BYTES
        self._intake.paused = settings.get("paused") == "1"
        self._intake.wake()
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
            "model": self._model_name,
            "version": ingine.__version__,
            "num_jobs": len(self._jobs),
            "num_running": stats.num_running,
            "num_waiting": stats.num_waiting,
            "kv_usage": round(stats.kv_usage, 4),
        }

    def _log_start(self) -> None:
        log_event(
            logger,
            logging.INFO,
            "worker ready",
            worker=self._settings.worker_id,
            queue=self._settings.queue,
            redis=redact(self._url),
            model=self._model_name,
            group=GROUP,
            http=self._http and f"{self._settings.http_host}:{self.http_port}",
        )
