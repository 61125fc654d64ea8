"""Numbers that somebody has written into a record: they concern that job alone, and never a worker."""

import pytest
import redis.asyncio

from ingine.connect.scripts import run_script
from ingine.contract.calls.running import Append, Finish, Refusal
from ingine.contract.events import TerminalEvent, TokensEvent
from ingine.contract.expiry import expire_due
from ingine.contract.jobs import Job
from ingine.contract.record import JobStatus
from ingine.producer.submission import build_submission
from tests.waiting import wait_until_async
from tests.worker.conftest import take

NONSENSE = ["", "x", "-1", "01", "1.0", "1e3", "nan", "inf", "9" * 25, "9" * 5000, b"\xff"]


async def submit_overdue(client, keys, job_id: str, **options) -> None:
    submission = build_submission("x", job_id=job_id, deadline_s=7200, **options)
    await run_script(client, submission.script_call(keys))
    await client.hset(keys.job(job_id), "deadline_at", 1)
    await client.zadd(keys.deadlines, {job_id: 1})


async def status(client, keys, job_id: str) -> bytes | None:
    return await client.hget(keys.job(job_id), "status")


@pytest.mark.parametrize("nonsense", NONSENSE)
async def test_a_position_that_is_no_count_is_broken(client, keys, make_queue, nonsense):
    for job_id in ("bad", "good"):
        await submit_overdue(client, keys, job_id)
    await client.hset(keys.job("bad"), "position", nonsense)
    await client.zadd(keys.deadlines, {"bad": 0})
    assert await expire_due(client, keys, result_ttl_s=60) is False
    assert await status(client, keys, "good") == b"expired"
    assert await status(client, keys, "bad") == b"queued"
    assert not await client.exists(keys.deadlines), "it is looked at no more"


@pytest.mark.parametrize("nonsense", NONSENSE)
@pytest.mark.parametrize("field", ["attempt", "submitted_at", "bytes", "deaths", "lease_ms"])
async def test_any_other_number_does_not_keep_a_job_from_expiring(client, keys, make_queue, field, nonsense):
    await submit_overdue(client, keys, "a")
    await client.hset(keys.job("a"), field, nonsense)
    await expire_due(client, keys, result_ttl_s=60)
    assert await status(client, keys, "a") == b"expired"


@pytest.mark.parametrize("nonsense", NONSENSE)
async def test_a_deadline_that_is_no_count_is_none(client, keys, make_queue, nonsense):
    await submit_overdue(client, keys, "a")
    await client.hset(keys.job("a"), "deadline_at", nonsense)
    await expire_due(client, keys, result_ttl_s=60)
    assert await status(client, keys, "a") == b"queued"
    assert not await client.exists(keys.deadlines)


@pytest.mark.parametrize("nonsense", ["inf", "nan", "-5", "1e300", "9" * 25])
async def test_a_lease_that_is_no_count_does_not_stay_due(client, keys, make_queue, nonsense):
    worker = make_queue("w1")
    await submit_overdue(client, keys, "a")
    await worker.begin(await take(worker), "a", None)
    await client.hset(keys.job("a"), "lease_ms", nonsense)
    await expire_due(client, keys, result_ttl_s=60)
    now_s, _ = await client.time()
    assert now_s < await client.zscore(keys.deadlines, "a") / 1000 < now_s + 7200


@pytest.mark.parametrize("nonsense", [*NONSENSE, str(2**63 - 1)])
async def test_an_attempt_or_position_that_is_no_count_is_a_bad_record(client, keys, make_queue, nonsense):
    """The entry is buried, since anything else would be retried for ever."""
    worker = make_queue("w1")
    for number, field in enumerate(("attempt", "position")):
        await submit_overdue(client, keys, f"job-{number}")
        await client.hset(keys.job(f"job-{number}"), field, nonsense)
        with pytest.raises(Exception, match="not an integer"):
            await worker.begin(await take(worker), f"job-{number}", None)


@pytest.mark.parametrize("field", ["idempotency_key", "model"])
async def test_a_text_that_is_not_utf_8_raises_nothing_when_a_job_begins(client, keys, make_queue, field):
    worker = make_queue("w1")
    await submit_overdue(client, keys, "a")
    await client.hset(keys.job("a"), mapping={field: b"\xff", "position": 1})
    assert (await worker.begin(await take(worker), "a", None)).verdict in ("run", "other_model")


@pytest.mark.parametrize("position", ["02", "+2", "2.0", "", "9" * 25])
async def test_nobody_writes_behind_a_position_that_only_looks_right(client, keys, make_queue, position):
    """Read as a number, it may equal the worker's own, and look like a fault of the engine."""
    worker = make_queue("w1")
    await submit_overdue(client, keys, "a")
    entry = await take(worker)
    await worker.begin(entry, "a", None)
    await worker.append([Append("a", 1, TokensEvent(2, [7, 8], "xy"), publish=True)])
    await client.hset(keys.job("a"), "position", position)
    assert await worker.append([Append("a", 1, TokensEvent(3, [9], "z"), publish=True)]) == [Refusal.BROKEN]
    with pytest.raises(Exception, match="not an integer"):
        await worker.finish(Finish(entry, 1, TerminalEvent(2, JobStatus.FINISHED, "a"), None))


async def test_a_worker_outlives_what_a_producer_writes(harness):
    worker = await harness()
    keys, client = worker.keys, worker.redis
    for number, nonsense in enumerate(["9" * 25, "9" * 5000, "01"]):
        for field in ("position", "attempt"):
            job_id = f"bad-{field}-{number}"
            await submit_overdue(client, keys, job_id, not_before_s=3600)
            await client.hset(keys.job(job_id), field, nonsense)

    async def swept() -> bool:
        return not await client.exists(keys.deadlines)

    await wait_until_async(swept, what="the sweep")
    await worker.push(Job(id="good", prompt="x", sampling={"max_tokens": 2}))
    assert (await worker.end("good")).status is JobStatus.FINISHED


async def test_a_foreign_key_of_the_queue_does_not_keep_a_worker_from_taking_jobs(harness, caplog):
    worker = await harness()
    await worker.redis.set(worker.keys.deadlines, "x")
    await wait_until_async(lambda: "foreign key" in caplog.text, what="a sweep")
    await worker.push(Job(id="good", prompt="x", sampling={"max_tokens": 2}))
    assert (await worker.end("good")).status is JobStatus.FINISHED


async def test_a_worker_starts_where_delayed_jobs_are_none(harness, redis_url, keys):
    """It tells how many there are in each heartbeat."""
    async with redis.asyncio.from_url(redis_url) as client:
        await client.set(keys.delayed, "x")
    worker = await harness()
    await worker.push(Job(id="good", prompt="x", sampling={"max_tokens": 2}))
    assert (await worker.end("good")).status is JobStatus.FINISHED
