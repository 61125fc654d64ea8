"""Bytes of an entry are its producer's choice: what is too large is buried without being read."""

import pytest

from ingine.contract.entries import MAX_ENTRY_BYTES
from ingine.contract.jobs import MAX_JOB_BYTES, Job, encode_job
from ingine.contract.keys import GROUP, RELEASED, parked
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode
from tests.served_models import TINY
from tests.waiting import wait_until_async
from tests.worker.test_worker import GREEDY


def job_of(num_bytes: int, job_id: str = "a") -> bytes:
    overhead = len(encode_job(Job(id=job_id, prompt="x" * 70_000))) - 70_000
    return encode_job(Job(id=job_id, prompt="x" * (num_bytes - overhead)))


@pytest.mark.parametrize("way", ["take", "claim", "unpark", "wait", "own"])
async def test_no_script_hands_out_what_no_worker_can_bear(client, keys, make_queue, way):
    """Though it says, as anybody can, that it was accepted."""
    queue, stream = make_queue("w1"), keys.jobs("normal")
    sizes = [MAX_JOB_BYTES, MAX_ENTRY_BYTES]
    entry_ids = [await client.xadd(stream, {"job": job_of(size), "tenant": "", "cost": 1}) for size in sizes]
    consumers = {"claim": RELEASED, "unpark": parked(TINY.fingerprint), "own": "w1"}
    if way in consumers:
        await client.xreadgroup(GROUP, consumers[way], {stream: ">"})
    match way:
        case "claim":
            entries = await queue.claim_idle(0, 2)
        case "own":
            entries, _ = await queue.own_pending()
        case "wait":
            entries = [*await queue.wait_for_new(0.1), *await queue.wait_for_new(0.1)]
        case _:
            entries = await queue.take(2)
    assert [entry.id for entry in entries] == [entry_id.decode() for entry_id in entry_ids]
    assert [len(entry.raw) for entry in entries] == [MAX_JOB_BYTES, 0]
    assert entries[1].num_bytes_unread > MAX_ENTRY_BYTES
    await client.delete(stream)


@pytest.mark.parametrize("fields", [{"bytes": "5"}, {"job": "", "bytes": "99999999"}], ids=["5", "many"])
async def test_an_entry_cannot_pass_for_one_that_was_not_read(client, keys, make_queue, fields):
    await client.xadd(keys.jobs("normal"), fields)
    (entry,) = await make_queue("w1").take(1)
    assert not entry.num_bytes_unread


async def test_what_says_that_it_was_accepted_is_not_read_either_if_no_worker_can_bear_it(harness):
    worker = await harness()
    raw = job_of(MAX_ENTRY_BYTES)
    await worker.redis.xadd(worker.keys.jobs("normal"), {"job": raw, "tenant": "", "cost": 1})
    await worker.push(Job(id="good", prompt="x", sampling=GREEDY))
    assert (await worker.end("good")).status is JobStatus.FINISHED
    (letter,) = await wait_until_async(worker.dead_letters, what="the dead letter")
    assert letter[b"code"].decode() == ErrorCode.JOB_TOO_LARGE
    assert letter[b"job"] == raw
    await worker.redis.delete(worker.keys.dead)
