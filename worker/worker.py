"""The worker: creates its parts, starts them in order, and stops them in order."""

import asyncio
import contextlib
import logging
from functools import partial

from redis.asyncio import Redis
from redis.exceptions import RedisError, ResponseError

from ingine.connect.servers import Servers
from ingine.contract.keys import Keys, all_partitions
from ingine.contract.record import JobStatus
from ingine.errors import ConfigError, EngineError
from ingine.worker.admission import Admission
from ingine.worker.finisher import Finisher
from ingine.worker.hand_over import HandOver
from ingine.worker.health import Health
from ingine.worker.hosting.engine_link import EngineHost
from ingine.worker.hosting.watchdog import StepHangs, watch_steps
from ingine.worker.http import HttpServer
from ingine.worker.identity import new_worker_id
from ingine.worker.jobs import JobTable, RunningJob
from ingine.worker.leases import LeaseThread
from ingine.worker.logs import log_event
from ingine.worker.message_formats import worker_formats
from ingine.worker.metrics import Metrics
from ingine.worker.output_handler import OutputHandler
from ingine.worker.partition import Partition, watch_number
from ingine.worker.preparation import Preparation
from ingine.worker.prompts import PromptReader
from ingine.worker.publisher import Publisher
from ingine.worker.queue import Queue
from ingine.worker.retry import until_served
from ingine.worker.served_model import ServedModel
from ingine.worker.server_check import check_server
from ingine.worker.settings import WorkerSettings
from ingine.worker.startup import enter, foreign_key, num_partitions, prepare
from ingine.worker.status import Status
from ingine.worker.tasks import cancel_all
from ingine.worker.throughput import Throughput

logger = logging.getLogger(__name__)


class Worker:
    """One worker on one queue. `await run()` serves until `stop()` or a fatal error.

    `engine` is built by the caller, so that it is ready, or has failed, before anything touches Redis.
    """

    def __init__(
        self, settings: WorkerSettings, redis_url: str | None, engine: EngineHost, *, model: ServedModel
    ):
        """redis_url: None for the local default server, see `ingine.connect.local_server`."""
        self._settings = settings
        self.id = new_worker_id(settings.worker_id)
        self._connect = partial(Servers, redis_url, client_name="ingine-worker")
        self._servers = self._connect()
        self._jobs = JobTable()
        self._metrics = metrics = Metrics()
        self._stop_requested = asyncio.Event()
        self._fatal: Exception | None = None
        self._model = model

        self._engine = engine
        finisher = Finisher(metrics)
        self._publisher = Publisher(self._jobs, finisher, metrics, engine.abort)
        formats = worker_formats(engine, settings)
        self.prompts = PromptReader(engine, formats, log_prompts=settings.log_prompts)
        preparation = Preparation(self._jobs, engine, finisher, self.prompts, metrics, expire=self._expire)
        self._admission = Admission(
            self._jobs,
            engine,
            finisher,
            preparation,
            metrics,
            num_places=engine.max_num_seqs,
            max_deaths=settings.max_deaths,
        )
        self._partitions: list[Partition] = []
        self._checked: set[Redis] = set()
        self._outputs = OutputHandler(
            engine, self._jobs, self._publisher, self._admission, metrics, failed=self._end_with
        )
        self._leases = LeaseThread(
            self._connect,
            self.id,
            self._jobs,
            lease_s=settings.lease_s,
            answered=lambda *answer: self._loop.call_soon_threadsafe(self._publisher.lease_answered, *answer),
            failed=lambda error: self._loop.call_soon_threadsafe(self._fail, "leases", error),
        )
        self._hand_over = HandOver(
            self._engine,
            self._outputs,
            self._jobs,
            self._admission,
            self._partitions,
            limit_s=settings.drain_timeout_s,
        )
        self._status = Status(
            settings, self.id, model, engine, self._jobs, metrics, self._partitions, self._stop_requested
        )
        self._health = Health(
            self._engine, self._partitions, self._publisher, self.prompts, self._status.state
        )
        self._http = None
        if settings.http_port >= 0:
            self._http = HttpServer(
                settings.http_host,
                settings.http_port,
                metrics.registry,
                healthy=self._health.unhealthy,
                ready=self._health.unready,
            )

    async def run(self) -> None:
        """Serve until `stop`, then hand over the jobs.

        Raises EngineError if a part of the worker failed, ConfigError for a server that must not be used,
        after the hand-over in both cases.
        """
        self._loop = asyncio.get_running_loop()
        if self._http:
            self._http.start()
        try:
            if await self._prepared():
                await self._serve()
        finally:
            await self._close()
        if isinstance(self._fatal, ConfigError):  # a partition's server was reached only after the start
            raise self._fatal
        if self._fatal:
            raise EngineError(f"the worker stopped: {self._fatal!r}") from self._fatal

    def stop(self) -> None:
        """Begin the hand-over: take no more jobs, finish the current step, release the jobs."""
        self._stop_requested.set()

    @property
    def http_port(self) -> int | None:
        return self._http and self._http.port

    @property
    def stopping(self) -> bool:
        return self._stop_requested.is_set()

    async def _prepared(self) -> bool:
        """Wait for Redis, and read the queue's number of partitions. Returns False if `stop` came first."""
        preparing = asyncio.create_task(until_served("start", self._prepare, failed=self._health.wait_for))
        asked = asyncio.create_task(self._stop_requested.wait())
        await asyncio.wait({preparing, asked}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        if not preparing.done():
            await cancel_all({preparing})
            return False
        await preparing
        return True

    async def _prepare(self) -> None:
        """Create the partitions. May be repeated. Needs only the server with the queue's own settings."""
        queue = self._settings.queue
        base = self._servers.client(Keys(queue))
        await self._check_server(
            base, Keys(queue)
        )  # distinguishes a wrong password from a server that is away
        number = await num_partitions(base, queue)
        self._partitions[:] = [self._partition(keys, number) for keys in all_partitions(queue, number)]

    async def _check_server(self, redis: Redis, keys: Keys) -> None:
        if redis not in self._checked:
            await check_server(redis, self._servers.where, keys)
            self._checked.add(redis)

    def _partition(self, keys: Keys, number: int) -> Partition:
        settings, redis = self._settings, self._servers.client(keys)
        queue = Queue(
            keys,
            self.id,
            redis,
            self._model,
            result_ttl_s=settings.result_ttl_s,
            max_deaths=settings.max_deaths,
            model_wait_s=settings.model_wait_s,
            lease_s=settings.lease_s,
            max_cost=self._engine.limits.max_num_tokens,
        )
        return Partition(
            queue,
            redis,
            self._admission,
            self._jobs,
            self._publisher,
            self._metrics,
            num_partitions=number,
            lease_s=settings.lease_s,
            describe=self._status.heartbeat,
            stop=self.stop,
        )

    async def _serve(self) -> None:
        self._leases.start([partition.queue for partition in self._partitions])
        await self._engine.start(self._outputs.deliver)
        intakes = {
            partition: asyncio.create_task(self._take_jobs(partition), name=f"intake of {partition.name}")
            for partition in self._partitions
        }
        publisher = asyncio.create_task(self._outputs.run(), name="publisher")
        queue, number = self._settings.queue, len(self._partitions)
        throughput = Throughput(self._engine, self._jobs, self._metrics)
        watch = watch_number(self._servers.client(Keys(queue)), queue, number)
        rest = {
            asyncio.create_task(watch_steps(self._engine, self._settings.step_timeout_s), name="watchdog"),
            asyncio.create_task(watch, name="number of partitions"),
            asyncio.create_task(throughput.run(), name="throughput"),
        }
        for partition in self._partitions:
            rest |= {asyncio.create_task(part, name=name) for name, part in partition.parts().items()}
        await self._until_stopped({publisher, *intakes.values(), *rest})
        try:
            # Any sequence in the batch of a hanging step may be the cause.
            hangs = isinstance(self._fatal, StepHangs)
            suspects = self._engine.suspects if hangs else ()
            await self._hand_over.run(intakes, publisher, rest, suspects=suspects)
        finally:
            await cancel_all({publisher, *intakes.values(), *rest})

    async def _take_jobs(self, partition: Partition) -> None:
        """Run the intake of a partition once its server is available. Other partitions do not wait for it."""
        redis = self._servers.client(partition.queue.keys)

        async def begin() -> None:
            await self._check_server(redis, partition.queue.keys)
            await prepare(redis, partition.queue, self._settings)
            await enter(redis, partition.queue, partition.heartbeat, self._settings)

        try:
            await until_served(f"start of {partition.name}", begin, failed=self._health.wait_for)
        except ResponseError as error:
            raise foreign_key(self._settings.queue, error) from None
        if not any(other.ready.is_set() for other in self._partitions):
            self._status.log_ready(self._servers.where, self.http_port)
        partition.ready.set()
        await partition.intake.run()

    async def _until_stopped(self, running: set[asyncio.Task]) -> None:
        """Wait until `stop` is called or one of the tasks ends, which none of them should."""
        asked = asyncio.create_task(self._stop_requested.wait())
        done, _ = await asyncio.wait({asked, *running}, return_when=asyncio.FIRST_COMPLETED)
        asked.cancel()
        for ended in done - {asked}:
            self._fail(ended.get_name(), ended.exception() or EngineError(f"{ended.get_name()} ended"))

    def _fail(self, part: str, error: Exception) -> None:
        """Log that a part has failed, and begin the hand-over. `run` then raises."""
        log_event(logger, logging.ERROR, "worker failed", part=part, error=repr(error))
        self._end_with(self._fatal or error)

    def _end_with(self, error: Exception) -> None:
        self._fatal = error
        self.stop()

    async def _close(self) -> None:
        await asyncio.to_thread(self._leases.stop)
        await self.prompts.close()
        if self._http:
            await asyncio.to_thread(self._http.stop)
        with contextlib.suppress(RedisError, OSError):
            await self._servers.aclose()

    def _expire(self, job: RunningJob) -> None:
        if job.ending is None:
            job.ending = JobStatus.EXPIRED
            self._engine.abort(job.seq_id)
