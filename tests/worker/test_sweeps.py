"""A worker's sweeps: expire overdue jobs, and adopt entries without a holder."""

import pytest

from ingine.connect.scripts import run_script
from ingine.contract.jobs import Job, encode_job
from ingine.contract.keys import GROUP, WAITING
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode
from ingine.producer.submission import build_submission
from ingine.worker.admission import Admission
from ingine.worker.queue import Queue
from tests.waiting import wait_until_async
from tests.worker.conftest import take
from tests.worker.test_worker import ENDLESS, GREEDY


async def submit(worker, job_id: str, **options) -> None:
    call = build_submission("x", job_id=job_id, **options).script_call(worker.keys)
    assert (await run_script(worker.redis, call)).verdict == "accepted"


@pytest.mark.parametrize("why", ["no room", "paused"])
async def test_a_job_that_waits_expires_on_time_though_nobody_takes_it(harness, monkeypatch, why):
    if why == "no room":
        monkeypatch.setattr(Admission, "room", 0)
    worker = await harness()
    if why == "paused":
        await worker.redis.hset(worker.keys.settings, "paused", 1)
        await wait_until_async(lambda: worker.worker._partitions[0].intake.paused, what="the pause")
    await submit(worker, "late", deadline_s=0.001, metadata={"row": 7})
    end = await worker.end("late")
    assert (end.status, end.position, end.metadata) == (JobStatus.EXPIRED, 0, {"row": 7})
    assert end.error["code"] == ErrorCode.DEADLINE_EXCEEDED
    assert await worker.redis.hget(worker.keys.job("late"), "attempt") == b"0", "it was never begun"


async def test_a_worker_adopts_on_its_start_what_nobody_has(harness):
    first = await harness()
    await wait_until_async(lambda: first.redis.exists(first.keys.jobs("normal")), what="the group")
    await first.stop()
    for job_id in ("held", "waits-1", "waits-2"):
        await first.push(Job(id=job_id, prompt="x", sampling=GREEDY))
    options = {"result_ttl_s": 60, "max_deaths": 3, "model_wait_s": 60}
    dead = Queue(first.keys, "dead", first.redis, first.queue.model, **options)
    await dead.begin(await take(dead), "held", None)
    for consumer in ("dead", WAITING):
        await first.redis.xgroup_delconsumer(first.keys.jobs("normal"), GROUP, consumer)
    second = await harness()
    for job_id in ("held", "waits-1", "waits-2"):
        assert (await second.end(job_id)).status is JobStatus.FINISHED


async def test_a_job_costs_no_more_than_the_longest_that_the_engine_takes(harness, tiny_engine):
    worker = await harness(tiny_engine(max_num_seqs=1))
    for job_id in ("a", "b"):
        raw = encode_job(Job(id=job_id, prompt="x", sampling=ENDLESS))
        fields = {"job": raw, "tenant": "t", "cost": 10**9}
        await worker.redis.xadd(worker.keys.jobs("low"), fields)
    ends = worker.keys.ends("low")
    end = await wait_until_async(lambda: worker.redis.zscore(ends, "tenant:t"), what="an order")
    assert end <= 2 * worker.engine.limits.max_num_tokens
