"""Changes while a job is being begun: its deadline, its log and its server."""

import asyncio
import time

from redis.exceptions import ConnectionError

from ingine.contract.events import TokensEvent
from ingine.contract.jobs import Job, encode_job
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode
from tests.waiting import wait_until_async
from tests.worker.test_worker import ENDLESS, GREEDY, leave_behind


async def test_a_deadline_counts_the_time_that_a_job_has_waited(harness):
    worker = await harness()
    job = Job(id="a", prompt="x", sampling=ENDLESS, deadline_ms=600_000)
    submitted = f"{int(time.time() * 1000) - 500_000}-0"
    await worker.redis.xadd(worker.keys.jobs("normal"), {"job": encode_job(job)}, id=submitted)
    await wait_until_async(lambda: len(worker.worker._jobs), what="its begin")
    (running,) = worker.worker._jobs
    left_s = running.expiry.when() - asyncio.get_running_loop().time()
    assert left_s <= 100


async def test_a_generation_goes_on_under_a_name_that_its_model_has_no_more(harness):
    """The weights are the same, as `begin` has found; only what has no tokens yet is refused by name."""
    worker = await harness()
    named = {"prompt": "x", "sampling": GREEDY, "model": "its-name-before"}
    await leave_behind(worker, Job(id="old", **named), [TokensEvent(1, [65], "A")])
    await worker.push(Job(id="new", **named))
    assert (await worker.end("old")).status is JobStatus.FINISHED
    assert (await worker.end("new")).error["code"] == ErrorCode.UNKNOWN_MODEL


async def test_a_server_that_goes_as_a_job_is_put_off_does_not_fail_it(harness, monkeypatch):
    worker = await harness()
    delay, calls = worker.queue.delay, []

    async def away_once(*args):
        calls.append(args)
        if len(calls) == 1:
            raise ConnectionError("gone")
        return await delay(*args)

    monkeypatch.setattr(worker.queue, "delay", away_once)
    await worker.push(Job(id="a", prompt="x", sampling=GREEDY, not_before_ms=1500))
    assert (await worker.end("a")).status is JobStatus.FINISHED
    assert len(calls) == 2
