"""A script touches what it has named in KEYS and nothing else: as a server reports it, and in a cluster."""

import asyncio
import re

from redis.asyncio import Redis

from ingine.connect.scripts import run_script
from ingine.connect.servers import Servers
from ingine.contract.calls.running import Append, Finish, renew
from ingine.contract.calls.upkeep import forget
from ingine.contract.entries import Entry
from ingine.contract.events import TerminalEvent, TokensEvent
from ingine.contract.expiry import expire
from ingine.contract.keys import GROUP, Keys, all_partitions, partition_of
from ingine.contract.record import JobStatus
from ingine.errors import ClientError
from ingine.producer import AsyncClient
from ingine.producer.events import delete_job
from ingine.worker.last_ids import LAST_MS
from ingine.worker.queue import Queue
from tests.served_models import OTHER, TINY
from tests.servers import cluster

NUM_PARTITIONS = 3
JOB = {"reply_to": "batch", "tenant": "gold", "deadline_s": 3600}


class Walk:
    """Each script that touches a job, at least once, in one partition of a queue."""

    def __init__(self, producer: AsyncClient, redis: Redis, keys: Keys, num_partitions: int):
        self.producer, self.redis, self.keys = producer, redis, keys
        options = {"result_ttl_s": 60, "max_deaths": 3, "model_wait_s": 60}
        self.queue = Queue(keys, "w1", redis, TINY, **options)
        self.other = Queue(keys, "w2", redis, OTHER, **options)
        names = (f"job-{number}" for number in range(1000))
        self.job_ids = (n for n in names if partition_of(n, num_partitions) == (keys.partition or 0))

    async def submit(self, **options) -> str:
        return (await self.producer.submit("x", job_id=next(self.job_ids), **JOB, **options)).job_id

    async def run(self) -> None:
        await self.queue.create_groups()
        entry = await self.runs_until_it_is_buried(await self.submit())
        assert await self.producer.cancel(job_id := await self.submit()) == "cancelled"
        assert await delete_job(self.producer, job_id) == "deleted"
        overdue = [await self.submit(), await self.submit(not_before_s=1800)]
        for job_id in overdue:
            await self.redis.hset(self.keys.job(job_id), "deadline_at", 1)
        ends = await expire(self.redis, self.keys, overdue, result_ttl_s=60)
        assert set(ends.values()) == {"expired"}
        await self.redis.xadd(self.keys.jobs("normal"), {"job": b"\xc1"})
        (entry,) = await self.queue.take(1)
        await self.redis.xgroup_delconsumer(self.keys.jobs("normal"), GROUP, "w1")
        assert await self.queue.adopt() == (1, False)
        (entry,) = await self.queue.claim_idle(0, 1)
        assert await self.queue.bury(entry, "invalid_shape", "why")
        job_id = await self.submit()
        (entry,) = await self.queue.take(1)
        assert await self.queue.bury(entry, "bad_record", "why", job_id=job_id)
        await self.redis.xadd(self.keys.jobs("normal"), {"job": b"\xc1"}, id=f"{LAST_MS}-0")
        job_id = await self.submit()
        assert await self.queue.adopt() == (2, False)
        assert await self.producer.cancel(job_id) == "cancelled"
        (entry,) = await self.queue.take(1)
        assert await self.queue.bury(entry, "not_msgpack", "why")
        assert await self.redis.xadd(self.keys.jobs("normal"), {"job": b"\xc1"}), "there are ids again"
        await run_script(self.redis, forget(self.keys, idle_ms=0))

    async def runs_until_it_is_buried(self, job_id: str) -> Entry:
        entry, attempt = await self.begin(await self.queue.take(1), job_id)
        call = renew(self.keys, [(entry, job_id, attempt)], worker_id="w1")
        assert await run_script(self.redis, call) == [None]
        assert await self.queue.append([Append(job_id, attempt, TokensEvent(1, [7], "x"), True)]) == [1]
        assert await self.queue.delay(entry, job_id, attempt)
        await self.redis.zadd(self.keys.delayed, {job_id: 1})
        await self.queue.promote()
        entry, attempt = await self.begin(await self.queue.take(1), job_id)
        assert await self.queue.release(entry, job_id, attempt)
        (entry,) = await self.queue.claim_idle(3600, 1)
        assert await self.queue.park(entry, job_id, OTHER.fingerprint)
        self.other.look_for_parked()
        (entry,) = await self.other.take(1)
        assert await self.other.release_unbegun(entry, job_id)
        entry, attempt = await self.begin(await self.queue.claim_idle(3600, 1), job_id)
        end = TerminalEvent(1, JobStatus.FAILED, job_id, error={"code": "worker_lost", "message": "why"})
        assert await self.queue.finish(Finish(entry, attempt, end, "batch", bury=True)) == 1

    async def begin(self, entries: list[Entry], job_id: str) -> tuple[Entry, int]:
        (entry,) = entries
        return entry, (await self.queue.begin(entry, job_id, "batch")).attempt


async def test_every_script_runs_in_a_cluster(tmp_path, queue: str):
    with cluster(tmp_path) as three:
        servers = Servers(three.url, client_name="ingine-test", retries=5)
        async with AsyncClient(three.url, queue=queue) as producer:
            await producer.set_partitions(NUM_PARTITIONS)
            partitions = all_partitions(queue, NUM_PARTITIONS)
            for keys in partitions:
                await Walk(producer, servers.client(keys), keys, NUM_PARTITIONS).run()
            assert len({three.owner(keys.settings).port for keys in partitions}) > 1
            await requeue_all(producer)
        await servers.aclose()


async def requeue_all(producer: AsyncClient) -> None:
    """Half of them are of jobs that have a record."""
    refused = 0
    letters = await producer.dead_letters()
    for letter in letters:
        try:
            await producer.requeue(letter.entry_id)
        except ClientError:
            refused += 1
    assert 2 * refused == len(letters) > 0


async def test_no_script_touches_a_key_that_it_has_not_named(redis_url: str, queue: str):
    """A cluster would run it all the same, while all keys of a partition are in one slot."""
    redis, keys = Redis.from_url(redis_url, protocol=2), Keys(queue)
    calls: list[tuple[set[str], set[str]]] = []
    seen = asyncio.Event()

    async def watch(monitor) -> None:
        async for command in monitor.listen():
            names = set(re.findall(rf"ingine:\{{{queue}\}}:[\w.:-]+", command["command"]))
            if command["client_type"] == "lua":
                calls[-1][1].update(names)
            elif command["command"].upper().startswith("EVALSHA"):
                calls.append((names, set()))
            elif "the end" in command["command"]:
                seen.set()

    async with redis.monitor() as monitor:
        watching = asyncio.create_task(watch(monitor))
        async with AsyncClient(queue=queue, redis=redis) as producer:
            await Walk(producer, redis, keys, 1).run()
            await requeue_all(producer)
        async with Redis.from_url(redis_url) as client:
            await client.echo("the end")
            await asyncio.wait_for(seen.wait(), 60)
        watching.cancel()
    assert sum(bool(touched) for _, touched in calls) > 20
    for named, touched in calls:
        assert touched <= named
