"""One worker on many partitions of one server: they share a client, and nothing that runs out."""

import asyncio

import redis.asyncio

from ingine.contract.jobs import Job, encode_job
from ingine.contract.keys import Keys, all_partitions
from ingine.worker.hosting.engine_thread import EngineThread
from ingine.worker.settings import WorkerSettings
from ingine.worker.worker import Worker
from tests.served_models import TINY
from tests.waiting import wait_until_async
from tests.worker.test_worker import GREEDY

NUM = 60


async def test_partitions_do_not_wait_for_each_other_s_connections(queue, redis_url, tiny_engine):
    """On one server all partitions share a client, and each has a read that waits for new jobs."""
    partitions = all_partitions(queue, NUM)
    async with redis.asyncio.from_url(redis_url, protocol=2) as client:
        for keys in (*partitions, Keys(queue)):
            await client.hset(keys.settings, "partitions", NUM)
        settings = WorkerSettings(_env_file=None, queue=queue, http_port=-1, worker_id="w")
        url = f"{redis_url}?max_connections=4"
        worker = Worker(settings, url, EngineThread(tiny_engine), model=TINY)
        running = asyncio.create_task(worker.run())

        async def all_ended() -> bool:
            ends = [await client.hget(keys.job(f"job-{n}"), "status") for n, keys in enumerate(partitions)]
            return set(ends) == {b"finished"}

        for n, keys in enumerate(partitions):
            job = Job(id=f"job-{n}", prompt="x", sampling=GREEDY)
            await client.xadd(keys.jobs("normal"), {"job": encode_job(job)})
        try:
            await wait_until_async(all_ended, what="the end of all jobs")
        finally:
            worker.stop()
            await running
