"""The contract is tested on fakeredis, which is fast, and on a real server, which is right."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import fakeredis
import pytest
import redis.asyncio

from ingine.contract.entries import Entry
from ingine.contract.events import TerminalEvent, decode_event
from ingine.contract.jobs import Job, encode_job
from ingine.contract.keys import GROUP, Keys, Priority, is_worker
from ingine.contract.record import JobStatus
from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.store.fingerprint import model_fingerprint
from ingine.worker.hosting.engine_process import EngineProcess
from ingine.worker.hosting.engine_thread import EngineThread
from ingine.worker.output_handler import OutputHandler
from ingine.worker.queue import Queue
from ingine.worker.served_model import ServedModel
from ingine.worker.settings import WorkerSettings
from ingine.worker.worker import Worker
from tests.served_models import TINY
from tests.tiny_models import make_tiny_model
from tests.waiting import HANGS_S, wait_until_async


@pytest.fixture(params=["fake", "real"])
async def client(request) -> AsyncIterator[redis.asyncio.Redis]:
    if request.param == "fake":
        client = fakeredis.FakeAsyncRedis(server=fakeredis.FakeServer(), version=(7,), protocol=2)
    else:
        client = redis.asyncio.from_url(request.getfixturevalue("redis_url"), protocol=2)
    yield client
    await client.aclose()


@pytest.fixture
def keys(queue: str) -> Keys:
    return Keys(queue)


@pytest.fixture
def step_by_step(monkeypatch) -> None:
    """Each step has events of its own, however long it waits for the server."""
    monkeypatch.setattr(OutputHandler, "_may_join", lambda self, seq_id: False)


MakeWorker = Callable[..., Queue]


@pytest.fixture
async def make_queue(client, keys) -> MakeWorker:
    """The queue as the worker of a given name sees it."""

    def make(worker_id: str, model: ServedModel = TINY, **options) -> Queue:
        options = {"result_ttl_s": 60, "max_deaths": 3, "model_wait_s": 60} | options
        return Queue(keys, worker_id, client, model, **options)

    await make("setup").create_groups()
    return make


@pytest.fixture
def push(client, keys) -> Callable[..., Awaitable[str]]:
    """Submit as a producer without a library does: one XADD. Returns the entry's id."""

    async def push(job: Job | bytes, priority: Priority = Priority.NORMAL) -> str:
        raw = job if isinstance(job, bytes) else encode_job(job)
        return (await client.xadd(keys.jobs(priority), {"job": raw})).decode()

    return push


async def take(queue: Queue) -> Entry:
    """The one entry that waits."""
    (entry,) = await queue.take(1)
    return entry


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A random Llama with a byte-level tokenizer and a chat template, in float32."""
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_engine(tiny_model) -> Callable[..., Engine]:
    """A new engine on each call; its options are `EngineConfig`'s."""

    def make(**options) -> Engine:
        defaults = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8, "kv_cache_bytes": 8 << 20}
        return Engine(EngineConfig(model=str(tiny_model), **defaults | options))

    return make


@dataclass
class Harness:
    """A worker in this process on the real server, and what a test needs beside it."""

    worker: Worker
    running: asyncio.Task
    redis: redis.asyncio.Redis
    keys: Keys
    engine: Engine | None
    """None: it is in another process."""
    push: Callable[..., Awaitable[str]]

    @property
    def queue(self) -> Queue:
        return self.worker._partitions[0].queue

    async def num_held(self) -> int:
        """Entries that workers have, of normal priority: not those that wait, nor those handed over."""
        consumers = await self.redis.xinfo_consumers(self.keys.jobs("normal"), GROUP)
        return sum(c["pending"] for c in consumers if is_worker(c["name"].decode()))

    async def events(self, job_id: str) -> list:
        """The log of an ended job, the terminal event last. Checks that positions are 1..N, each once."""
        await wait_until_async(lambda: self._status(job_id), what=f"the end of {job_id}")
        entries = await self.redis.xrange(self.keys.tokens(job_id))
        events = [decode_event(fields[b"event"]) for _, fields in entries]
        position = 0
        for event in events[:-1]:
            assert event.position - len(event.token_ids) == position
            position = event.position
        assert events[-1].position == position
        return events

    async def _status(self, job_id: str) -> bool:
        status = await self.redis.hget(self.keys.job(job_id), "status")
        return status is not None and JobStatus(status.decode()).terminal

    async def text(self, job_id: str) -> str:
        return "".join(event.text for event in await self.events(job_id))

    async def end(self, job_id: str) -> TerminalEvent:
        return (await self.events(job_id))[-1]

    async def position(self, job_id: str) -> int:
        return int(await self.redis.hget(self.keys.job(job_id), "position") or 0)

    async def dead_letters(self) -> list[dict[bytes, bytes]]:
        return [fields for _, fields in await self.redis.xrange(self.keys.dead)]

    async def stop(self) -> None:
        self.worker.stop()
        async with asyncio.timeout(HANGS_S):
            await self.running


@pytest.fixture
async def harness(
    redis_url, queue, tiny_engine, tiny_model
) -> AsyncIterator[Callable[..., Awaitable[Harness]]]:
    """Starts a worker with these settings. Each is stopped, and the blocks of an engine here are counted."""
    started: list[Harness] = []
    # As `ingine worker` would have it, whose jobs such a worker goes on with.
    served = ServedModel(TINY.names, model_fingerprint(tiny_model), TINY.numerics)
    client = redis.asyncio.from_url(redis_url, protocol=2)

    async def push(job: Job | bytes, priority: Priority = Priority.NORMAL) -> str:
        raw = job if isinstance(job, bytes) else encode_job(job)
        return (await client.xadd(Keys(queue).jobs(priority), {"job": raw})).decode()

    async def start(
        engine: Engine | EngineProcess | None = None, model: ServedModel = served, **options
    ) -> Harness:
        settings = WorkerSettings(
            _env_file=None,
            **{"queue": queue, "http_port": -1, "lease_s": 2.0, "worker_id": f"w{len(started)}"} | options,
        )
        if isinstance(engine, EngineProcess):
            host, engine = engine, None
        else:
            engine = engine or tiny_engine()
            host = EngineThread(lambda: engine)
        worker = Worker(settings, redis_url, host, model=model)
        running = asyncio.create_task(worker.run())
        await wait_until_async(lambda: worker._partitions, what="the start")
        started.append(Harness(worker, running, client, Keys(queue), engine, push))
        return started[-1]

    yield start
    for harness in started:
        if not harness.running.done():
            await harness.stop()
        harness.worker._engine.close()
        if harness.engine:
            harness.engine.check_integrity()
    await client.aclose()
