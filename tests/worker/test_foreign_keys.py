"""Foreign values under a queue's keys harm only the job that they concern."""

import pytest

from ingine.connect.scripts import run_script
from ingine.contract.calls.running import Append, Refusal, renew
from ingine.contract.events import TokensEvent
from ingine.contract.jobs import Job, encode_job
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode
from tests.waiting import wait_until_async
from tests.worker.test_worker import ENDLESS, GREEDY, leave_behind


async def begun(queue, push, job_id: str):
    await push(Job(id=job_id, prompt="x"))
    (entry,) = await queue.take(1)
    await queue.begin(entry, job_id, None)
    return entry


def first_token(job_id: str) -> Append:
    return Append(job_id, 1, TokensEvent(1, [65], "A"), publish=False)


@pytest.mark.parametrize("spoil", ["log of another kind", "log of another life", "record of another kind"])
async def test_a_job_whose_log_cannot_be_written_costs_its_neighbours_nothing(
    client, keys, make_queue, push, spoil
):
    queue = make_queue("w1")
    for job_id in ("bad", "good"):
        await begun(queue, push, job_id)
    match spoil:
        case "log of another kind":
            await client.set(keys.tokens("bad"), "x")
        case "log of another life":
            await client.xadd(keys.tokens("bad"), {"event": "x"}, id="7-0")
        case _:
            await client.set(keys.job("bad"), "x")
    assert await queue.append([first_token("bad"), first_token("good")]) == [Refusal.BROKEN, 1]


async def test_a_record_of_another_kind_loses_its_own_lease_alone(client, keys, make_queue, push):
    queue = make_queue("w1")
    entries = {job_id: await begun(queue, push, job_id) for job_id in ("bad", "good")}
    await client.set(keys.job("bad"), "x")
    leases = [(entry, job_id, 1) for job_id, entry in entries.items()]
    assert await run_script(client, renew(keys, leases, worker_id="w1")) == [Refusal.STALE, None]


async def test_a_broken_log_ends_in_the_dead_letters_and_the_others_go_on(harness):
    worker = await harness()
    for job_id in ("bad", "good"):
        await worker.push(Job(id=job_id, prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("good"), what="tokens")
    await worker.redis.delete(worker.keys.tokens("bad"))
    await worker.redis.set(worker.keys.tokens("bad"), "x")
    assert (await worker.end("good")).status is JobStatus.FINISHED
    (letter,) = await wait_until_async(worker.dead_letters, what="the dead letter")
    assert letter[b"code"].decode() == ErrorCode.BAD_RECORD
    await worker.redis.delete(worker.keys.tokens("bad"))


async def test_nonsense_in_a_record_counts_as_nothing(harness):
    worker = await harness()
    await leave_behind(worker, Job(id="a", prompt="x", sampling=GREEDY), [TokensEvent(1, [65], "A")])
    await worker.redis.hset(worker.keys.job("a"), "deaths", "many")
    assert (await worker.end("a")).status is JobStatus.FINISHED


async def test_what_is_no_text_among_the_delayed_harms_nobody(harness):
    worker = await harness()
    await worker.redis.zadd(worker.keys.delayed, {b"\xff\xfe": 1})
    await worker.push(Job(id="a", prompt="x", sampling=GREEDY))
    assert (await worker.end("a")).status is JobStatus.FINISHED
    await wait_until_async(lambda: _gone(worker), what="the end of the nonsense")


async def _gone(worker) -> bool:
    return not await worker.redis.exists(worker.keys.delayed)


async def test_a_job_that_was_accepted_runs_whatever_the_limit_is_by_now(harness):
    worker = await harness(max_job_bytes=64)
    large = Job(id="large", prompt="x" * 100, sampling=GREEDY)
    await wait_until_async(lambda: worker.worker._partitions[0].intake.max_job_bytes == 64, what="the limit")
    await worker.push(large)
    assert (await wait_until_async(worker.dead_letters, what="its burial"))[0][b"code"] == b"job_too_large"
    fields = {"job": encode_job(large), "tenant": "", "cost": 1}
    await worker.redis.xadd(worker.keys.jobs("normal"), fields)
    assert (await worker.end("large")).status is JobStatus.FINISHED
