"""A paused worker begins nothing, wherever the job comes from. It begins all of it when the queue resumes."""

import asyncio
import itertools

import pytest
import redis.asyncio

from ingine.contract.jobs import Job, encode_job
from ingine.contract.keys import GROUP, Keys, Priority, all_partitions
from ingine.contract.record import JobStatus
from ingine.producer import AsyncClient
from tests.waiting import wait_until_async
from tests.worker.test_worker import ENDLESS, GREEDY, leave_behind

NUMBERS = itertools.count(1)


class Turns:
    """Counts an intake's turns: what a worker does is bounded in these, not in seconds."""

    def __init__(self, intake):
        self.num_begun, self._turn = 0, intake._turn
        intake._turn = self._counted

    async def _counted(self) -> None:
        self.num_begun += 1
        await self._turn()

    async def pass_by(self, num_turns: int = 3) -> None:
        """Wait until so many whole turns are over."""
        last = self.num_begun + num_turns + 1
        await wait_until_async(lambda: self.num_begun > last, what="turns of the intake")


async def pause(redis, *partitions: Keys) -> None:
    for keys in partitions:
        await redis.hset(keys.settings, "paused", 1)


async def resume(redis, *partitions: Keys) -> None:
    for keys in partitions:
        await redis.hdel(keys.settings, "paused")


def url_of(worker) -> str:
    return worker.worker._connect.args[0]


async def new_job(worker, job_id: str) -> None:
    async with AsyncClient(url_of(worker), queue=worker.keys.queue) as client:
        await client.submit("x", job_id=job_id, max_tokens=4, tenant="t")


async def bare_xadd(worker, job_id: str) -> None:
    await worker.push(Job(id=job_id, prompt="x", sampling=GREEDY), Priority.HIGH)


async def due_delayed_job(worker, job_id: str) -> None:
    async with AsyncClient(url_of(worker), queue=worker.keys.queue) as client:
        await client.submit("x", job_id=job_id, max_tokens=4, not_before_s=0.001)


async def dead_workers_job(worker, job_id: str, *, deaths: int = 0) -> None:
    """Its lease has run out. In one transaction, since a worker may be looking for new entries."""
    stream, entry = worker.keys.jobs("normal"), f"9999999999999-{next(NUMBERS)}"
    job = Job(id=job_id, prompt="x", sampling=GREEDY)
    record = {"status": "running", "worker": "dead", "entry": entry, "attempt": 1, "position": 0}
    async with worker.redis.pipeline(transaction=True) as pipe:
        pipe.xadd(stream, {"job": encode_job(job)}, id=entry)
        pipe.hset(worker.keys.job(job_id), mapping=record | {"deaths": deaths, "submitted_at": 1})
        pipe.xreadgroup(GROUP, "dead", {stream: ">"})
        pipe.xclaim(stream, GROUP, "dead", 0, [entry], idle=3_600_000)
        await pipe.execute()


async def suspect(worker, job_id: str) -> None:
    await dead_workers_job(worker, job_id, deaths=1)


async def released_job(worker, job_id: str) -> None:
    """Handed over by another worker."""
    stream = worker.keys.jobs("normal")
    entry = await worker.push(Job(id=job_id, prompt="x", sampling=GREEDY))
    await worker.redis.xreadgroup(GROUP, "waiting", {stream: ">"})
    await worker.redis.xclaim(stream, GROUP, "released", 0, [entry], idle=1_000_000_000)
    await worker.redis.spublish(worker.keys.control, b"\x81\xa7command\xa8released")


SOURCES = [dead_workers_job, suspect, released_job, new_job, bare_xadd, due_delayed_job]


@pytest.mark.parametrize("when", ["before it starts", "while it serves"])
async def test_a_paused_worker_begins_nothing_and_resumes(harness, when):
    if when == "before it starts":
        other = await harness()
        await other.stop()
        await pause(other.redis, other.keys)
        worker = await harness()
    else:
        worker = await harness()
        await pause(worker.redis, worker.keys)
    intake = worker.worker._partitions[0].intake
    await wait_until_async(lambda: intake.paused, what="the pause")
    turns = Turns(intake)
    for source in SOURCES:
        await source(worker, source.__name__)
    await turns.pass_by()
    assert not len(worker.worker._jobs)
    for source in SOURCES:
        began_at = await worker.redis.hget(worker.keys.job(source.__name__), "began_at")
        assert began_at is None, f"{source.__name__} has begun"
    assert await worker.num_held() == 2  # of the dead worker
    await resume(worker.redis, worker.keys)
    for source in SOURCES:
        assert (await worker.end(source.__name__)).status is JobStatus.FINISHED


async def test_a_nudge_spares_waiting_for_the_next_heartbeat(harness, redis_url, monkeypatch):
    monkeypatch.setattr("ingine.worker.heartbeat.INTERVAL_S", 3600)
    worker = await harness()
    intake, keys = worker.worker._partitions[0].intake, worker.keys
    async with AsyncClient(redis_url, queue=keys.queue) as client:
        await wait_until_async(lambda: listening(worker.redis, keys.control), what="the control channel")
        await client.pause()
        await wait_until_async(lambda: intake.paused, what="the pause")
        await client.resume()
        await wait_until_async(lambda: not intake.paused, what="the end of the pause")


async def listening(redis, channel: str) -> bool:
    return bool((await redis.execute_command("PUBSUB", "SHARDNUMSUB", channel))[1])


async def test_what_runs_goes_on(harness):
    worker = await harness()
    await worker.push(Job(id="running", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("running"), what="tokens")
    await pause(worker.redis, worker.keys)
    end = await worker.end("running")
    assert (end.status, end.timings["attempts"]) == (JobStatus.FINISHED, 1)


async def test_what_was_being_read_as_the_pause_came_is_not_begun(harness, monkeypatch):
    worker = await harness()
    intake, queue = worker.worker._partitions[0].intake, worker.queue
    take, reading, go_on = queue.take, asyncio.Event(), asyncio.Event()

    async def take_slowly(count):
        entries = await take(count)
        if entries:
            reading.set()
            await go_on.wait()
        return entries

    async def nothing_new(timeout_s):
        """A waiting read would bring the first job alone, past the slow one."""
        await asyncio.sleep(0.01)
        return []

    monkeypatch.setattr(queue, "take", take_slowly)
    monkeypatch.setattr(queue, "wait_for_new", nothing_new)
    await Turns(intake).pass_by()  # the read that waited as it was replaced is over
    async with worker.redis.pipeline(transaction=True) as pipe:
        for name in "ab":
            pipe.xadd(worker.keys.jobs("normal"), {"job": encode_job(Job(id=name, prompt="x"))})
        await pipe.execute()
    await reading.wait()
    await pause(worker.redis, worker.keys)
    await wait_until_async(lambda: intake.paused, what="the pause")
    go_on.set()
    await Turns(intake).pass_by()
    assert await worker.redis.exists(worker.keys.job("a"), worker.keys.job("b")) == 0
    await resume(worker.redis, worker.keys)
    for name in "ab":
        assert (await worker.end(name)).status is JobStatus.FINISHED


async def test_what_an_outage_hid_is_not_begun_by_a_paused_worker(harness):
    """Delivered, though the reply was lost; the worker asks for it when it is connected again."""
    worker = await harness()
    intake = worker.worker._partitions[0].intake
    await pause(worker.redis, worker.keys)
    await wait_until_async(lambda: intake.paused, what="the pause")
    turns = Turns(intake)
    await turns.pass_by()  # among them the read that was under way
    await worker.push(Job(id="a", prompt="x", sampling=GREEDY))
    await worker.redis.xreadgroup(GROUP, worker.queue.worker_id, {worker.keys.jobs("normal"): ">"})
    intake._lost_delivery = True
    await turns.pass_by()
    assert not await worker.redis.exists(worker.keys.job("a"))
    assert await worker.num_held() == 0, "a peer may have it"
    await resume(worker.redis, worker.keys)
    assert (await worker.end("a")).status is JobStatus.FINISHED


async def test_a_suspect_of_a_paused_partition_keeps_no_other_partition_waiting(
    harness, redis_url, queue, monkeypatch
):
    partitions = all_partitions(queue, 2)
    async with redis.asyncio.from_url(redis_url, protocol=2) as client:
        for keys in (*partitions, Keys(queue)):
            await client.hset(keys.settings, "partitions", 2)
    worker = await harness()
    names = ["suspect", "running"]
    worker.keys = partitions[1]
    running = Job(id=names[1], prompt="x", sampling=ENDLESS)
    await worker.redis.xadd(partitions[1].jobs("normal"), {"job": encode_job(running)})
    await wait_until_async(lambda: worker.position(names[1]), what="tokens of a job that runs")
    served, go_on = worker.worker._partitions[1].queue, asyncio.Event()
    append = served.append

    async def append_later(appends):
        await go_on.wait()
        return await append(appends)

    monkeypatch.setattr(served, "append", append_later)  # the job does not end meanwhile
    worker.keys = partitions[0]
    await leave_behind(worker, Job(id=names[0], prompt="x", sampling=GREEDY), [], deaths=1)
    await wait_until_async(lambda: worker.worker._admission.num_suspects, what="the suspect")
    await pause(worker.redis, partitions[0])
    await wait_until_async(lambda: not worker.worker._admission.num_suspects, what="its being let go")
    go_on.set()
    assert worker.worker._status.state() == "serving", "the other partition is served"
    other = Job(id="other", prompt="x", sampling=GREEDY)  # by hand, so its partition is not its id's
    await worker.redis.xadd(partitions[1].jobs("normal"), {"job": encode_job(other)})
    worker.keys = partitions[1]
    assert (await worker.end(other.id)).status is JobStatus.FINISHED
    await pause(worker.redis, partitions[1])
    await wait_until_async(lambda: worker.worker._status.state() == "paused", what="the pause of all")
    await resume(worker.redis, *partitions)
    worker.keys = partitions[0]
    assert (await worker.end(names[0])).status is JobStatus.FINISHED
