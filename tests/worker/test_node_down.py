"""A cluster one of whose nodes is away: the worker serves the others, and that one when it comes."""

import asyncio
import re
import time
from types import SimpleNamespace

import pytest

from ingine.connect.servers import Servers
from ingine.contract.jobs import Job, encode_job
from ingine.contract.keys import Keys, all_partitions
from ingine.errors import ConfigError
from ingine.worker.health import HEALTHY_ANSWER_S, Health
from ingine.worker.hosting.engine_thread import EngineThread
from ingine.worker.settings import WorkerSettings
from ingine.worker.worker import Worker
from tests.served_models import TINY
from tests.servers import cluster
from tests.waiting import HANGS_S, wait_until_async
from tests.worker.test_worker import GREEDY

NUM = 8


@pytest.fixture
async def queue_on_three(tmp_path, queue):
    """A cluster, its clients, and a queue of several partitions with a job in each."""
    with cluster(tmp_path) as three:
        servers = Servers(three.url, client_name="test", retries=5)
        await servers.client(Keys(queue)).hset(Keys(queue).settings, "partitions", NUM)
        for n, keys in enumerate(all_partitions(queue, NUM)):
            await servers.client(keys).hset(keys.settings, "partitions", NUM)
            entry = {"job": encode_job(Job(id=f"job-{n}", prompt="x", sampling=GREEDY))}
            await servers.client(keys).xadd(keys.jobs("normal"), entry)
        yield three, servers
        await servers.aclose()


def new_worker(queue: str, url: str, tiny_engine) -> Worker:
    settings = WorkerSettings(_env_file=None, queue=queue, http_port=-1, worker_id="w")
    return Worker(settings, url, EngineThread(tiny_engine), model=TINY)


def apart(three, queue: str):
    """A node that has not the queue's own hash, and the numbers of the partitions that it has."""
    home = three.owner(Keys(queue).settings)
    owners = [three.owner(keys.settings) for keys in all_partitions(queue, NUM)]
    node = next(owner for owner in owners if owner is not home)
    return node, {n for n, owner in enumerate(owners) if owner is node}


async def test_a_worker_starts_without_a_node_and_serves_it_when_it_is_back(
    queue_on_three, queue, tiny_engine
):
    three, servers = queue_on_three
    node, lost = apart(three, queue)
    partitions = all_partitions(queue, NUM)
    node.kill()
    worker = new_worker(queue, three.url, tiny_engine)
    running = asyncio.create_task(worker.run())

    async def ended(numbers) -> bool:
        keys = {n: partitions[n] for n in numbers}
        ends = [await servers.client(k).hget(k.job(f"job-{n}"), "status") for n, k in keys.items()]
        return set(ends) == {b"finished"}

    try:
        await wait_until_async(lambda: ended(set(range(NUM)) - lost), what="the end of the others' jobs")
        assert worker._health.unready() is None
        node.start()
        await wait_until_async(lambda: ended(lost), what="the end of its jobs")
    finally:
        worker.stop()
        await running


async def test_a_worker_that_still_waits_for_a_node_can_be_stopped(queue_on_three, queue, tiny_engine):
    three, _ = queue_on_three
    node, lost = apart(three, queue)
    node.kill()
    worker = new_worker(queue, three.url, tiny_engine)
    running = asyncio.create_task(worker.run())
    await wait_until_async(
        lambda: sum(p.ready.is_set() for p in worker._partitions) == NUM - len(lost), what="the others"
    )
    worker.stop()
    async with asyncio.timeout(HANGS_S):
        await running


async def test_a_node_that_would_delete_jobs_is_refused_whenever_it_comes(queue_on_three, queue, tiny_engine):
    three, _ = queue_on_three
    node, _ = apart(three, queue)
    node.admin.config_set("maxmemory-policy", "allkeys-lru")
    with pytest.raises(ConfigError, match="allkeys-lru"):
        async with asyncio.timeout(HANGS_S):
            await new_worker(queue, three.url, tiny_engine).run()


def test_only_the_silence_of_all_makes_a_worker_unhealthy():
    long_ago = time.monotonic() - HEALTHY_ANSWER_S - 1
    ready = SimpleNamespace(is_set=lambda: True)
    partitions = [
        SimpleNamespace(
            heartbeat=SimpleNamespace(last_answer=long_ago),
            intake=SimpleNamespace(last_error=error),
            ready=ready,
        )
        for error in (None, "LOADING")
    ]
    health = Health(SimpleNamespace(alive=True), partitions, None, None, None)
    assert re.fullmatch("Redis has not answered a heartbeat for .* s: LOADING", health.unhealthy())
    partitions[1].heartbeat.last_answer = time.monotonic()
    assert health.unhealthy() is None
