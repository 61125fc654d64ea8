"""Listing the jobs of a queue, and cancelling all that wait."""

from datetime import timedelta

import msgpack
import pytest
from redis.asyncio import Redis

from ingine.contract.jobs import Job, encode_job
from ingine.contract.keys import GROUP, Keys
from ingine.contract.record import JobStatus
from ingine.producer import AsyncClient, InvalidArgument, JobCancelled, queue_jobs
from tests.producer.conftest import Face
from tests.producer.fake_worker import FakeWorker


@pytest.fixture(autouse=True)
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingine.producer.listing.ENTRIES_PER_PAGE", 2)
    monkeypatch.setattr("ingine.producer.listing.IDS_PER_PAGE", 2)


async def some_jobs(face: Face, worker: FakeWorker) -> None:
    await face("submit", "hi", job_id="runs")
    await worker.take()
    for n in range(3):
        await face("submit", "hi", job_id=f"low-{n}", priority="low", tenant="t", reply_to="r")
    for n in range(3):
        await face("submit", "hi", job_id=f"later-{n}", not_before_s=3600, tenant="u", metadata={"n": n})
    await face("submit", "hi", job_id="urgent", priority="high")


async def test_jobs_are_listed_by_priority_and_age(face: Face, worker: FakeWorker):
    await some_jobs(face, worker)
    jobs = await face("jobs")
    later = {f"later-{n}" for n in range(3)}
    assert [job.job_id for job in jobs][:5] == ["urgent", "runs", "low-0", "low-1", "low-2"]
    assert {job.job_id for job in jobs[5:]} == later
    assert [job.status for job in jobs][:3] == ["queued", "running", "queued"]
    assert {job.status for job in jobs[5:]} == {"delayed"}
    assert (jobs[1].worker, jobs[0].worker) == ("fake", None)
    assert [job.tenant for job in jobs[1:3]] == [None, "t"]
    assert jobs[5].tenant == "u" and jobs[5].entry is None and jobs[2].entry is not None
    assert all(0 <= job.age_s < 600 and job.submitted_at_ms and job.num_bytes > 0 for job in jobs)


async def test_a_list_can_be_of_some(face: Face, worker: FakeWorker):
    await some_jobs(face, worker)

    async def ids(**wanted) -> list[str]:
        return [job.job_id for job in await face("jobs", **wanted)]

    assert await ids(status="running") == ["runs"]
    assert sorted(await ids(status=JobStatus.DELAYED)) == ["later-0", "later-1", "later-2"]
    assert await ids(priority="low", limit=2) == ["low-0", "low-1"]
    assert sorted(await ids(tenant="u")) == ["later-0", "later-1", "later-2"]
    assert await ids(limit=1) == ["urgent"]
    assert await ids(older_than_s=timedelta(hours=1)) == []
    for wrong in ({"status": "finished"}, {"priority": "urgent"}, {"limit": 0}, {"older_than_s": "1"}):
        with pytest.raises(InvalidArgument, match=next(iter(wrong))):
            await ids(**wrong)


async def test_what_cannot_be_read_is_listed_and_duplicates_are_not(face: Face, redis: Redis, keys: Keys):
    await face("submit", "hi", job_id="mine")
    await redis.xadd(keys.jobs("normal"), {"job": encode_job(Job(id="mine", prompt="again"))})
    await redis.xadd(keys.jobs("normal"), {"job": b"\xc1"})
    await redis.xadd(keys.jobs("normal"), {"task": b"no job"})
    await redis.xadd(keys.jobs("normal"), {"job": encode_job(Job(id="bare", prompt="hi", tenant="t"))})
    await redis.hset(keys.job("odd"), "status", "paused")
    await redis.xadd(keys.jobs("normal"), {"job": msgpack.packb({"id": "odd", "colour": "red"})})
    jobs = await face("jobs")
    assert [(job.job_id, job.tenant) for job in jobs] == [
        ("mine", None),
        (None, None),
        (None, None),
        ("bare", "t"),
    ]


async def test_purging_cancels_what_waits_and_tells_who_waits_for_it(
    face: Face, worker: FakeWorker, redis: Redis, keys: Keys
):
    await some_jobs(face, worker)
    assert await face("purge_jobs") == {"cancelled": 7, "requested": 0}
    assert [job.job_id for job in await face("jobs")] == ["runs"]
    for job_id in ("low-0", "low-2", "later-1", "urgent"):
        assert (await face("status", job_id)).status == "cancelled"
        with pytest.raises(JobCancelled):
            await face.result(job_id)
    assert await redis.zcard(keys.delayed) == 0
    assert (await face("queue_info")).num_bytes > 0, "of the one that runs"
    replies = [msgpack.unpackb(fields[b"event"]) for _, fields in await redis.xrange(keys.replies("r"))]
    assert [reply["job_id"] for reply in replies] == ["low-0", "low-1", "low-2"]
    [(_, fields)] = await redis.xrange(keys.tokens("later-1"))
    assert msgpack.unpackb(fields[b"event"])["metadata"] == {"n": 1}
    assert await face("purge_jobs") == {"cancelled": 0, "requested": 0}


async def test_purging_some(face: Face, worker: FakeWorker):
    await some_jobs(face, worker)
    assert (await face("purge_jobs", older_than_s=3600))["cancelled"] == 0
    assert (await face("purge_jobs", priority="high"))["cancelled"] == 1
    assert (await face("purge_jobs", tenant="u"))["cancelled"] == 3
    assert [job.job_id for job in await face("jobs")] == ["runs", "low-0", "low-1", "low-2"]


async def test_a_bare_entry_is_purged_with_a_record_and_a_terminal_event(
    face: Face, redis: Redis, keys: Keys
):
    job = Job(id="bare", prompt="hi", reply_to="r", metadata={"a": 1})
    await redis.xgroup_create(keys.jobs("low"), GROUP, id="0", mkstream=True)
    await redis.xadd(keys.jobs("low"), {"job": encode_job(job)})
    await redis.xadd(
        keys.jobs("low"), {"job": encode_job(Job(id="from-the-future", prompt="hi"))}, id=f"{10**15}-0"
    )
    await redis.xadd(keys.jobs("low"), {"job": b"\xc1"})
    assert await face("purge_jobs") == {"cancelled": 2, "requested": 0}
    with pytest.raises(JobCancelled):
        await face.result("bare")
    info = await face("status", "bare")
    assert (info.status, info.priority) == ("cancelled", "low")
    assert (await face("status", "from-the-future")).submitted_at_ms < 10**14
    assert await redis.xlen(keys.replies("r")) == 1
    assert await redis.ttl(keys.job("bare")) > 0
    assert await redis.xlen(keys.jobs("low")) == 1, "what cannot be read is left to a worker, which buries it"


async def test_what_had_begun_before_is_asked_to_end(
    face: Face, worker: FakeWorker, redis: Redis, keys: Keys
):
    """A stopping worker handed the job over. Its log has tokens, and only a worker may append to them."""
    await face("submit", "hi", job_id="mine")
    await worker.take()
    await worker.commit("mine", 0, 2)
    await redis.hset(keys.job("mine"), "status", "queued")
    assert await face("purge_jobs") == {"cancelled": 0, "requested": 1}
    assert (await face("status", "mine")).cancel_requested


async def test_a_job_that_ends_meanwhile_is_not_counted(
    client: AsyncClient, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
):
    jobs = await client.submit_many({"prompt": "hi"} for _ in range(4))
    cancel_all = queue_jobs._cancel_all

    async def late(partition, page):
        if not (await jobs[0].status()).status.terminal:
            await worker.take()
            await worker.end(jobs[0].job_id, 0)
        return await cancel_all(partition, page)

    monkeypatch.setattr(queue_jobs, "_cancel_all", late)
    assert await client.purge_jobs() == {"cancelled": 3, "requested": 0}
