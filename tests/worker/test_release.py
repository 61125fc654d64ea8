"""`release.lua` of an entry that does not run here, on fakeredis and on a real server."""

import pytest

from ingine.contract.jobs import Job
from ingine.contract.keys import GROUP, RELEASED
from ingine.worker.queue import Queue
from tests.worker.conftest import take


async def holder(queue: Queue, keys, client, entry) -> str:
    (pending,) = await client.xpending_range(keys.jobs("normal"), GROUP, entry.id, entry.id, 1)
    return pending["consumer"].decode()


async def test_a_begin_whose_reply_was_lost_is_handed_over_without_a_death(make_queue, push, client, keys):
    ours, theirs = make_queue("w1"), make_queue("w2")
    await push(Job(id="a", prompt="x"))
    entry = await take(ours)
    await ours.begin(entry, "a", None)
    assert await ours.release_unbegun(entry, "a")
    assert await client.hmget(keys.job("a"), "status", "worker") == [b"queued", b""]
    assert await holder(ours, keys, client, entry) == RELEASED
    (again,) = await theirs.claim_idle(60, 1)
    begun = await theirs.begin(again, "a", None)
    assert (begun.attempt, begun.deaths) == (2, 0)


async def test_what_another_worker_died_under_still_counts(make_queue, push, client, keys):
    dead, ours, theirs = (make_queue(name) for name in ("dead", "w1", "w2"))
    await push(Job(id="a", prompt="x"))
    await dead.begin(await take(dead), "a", None)
    (entry,) = await ours.claim_idle(0, 1)
    assert await ours.release_unbegun(entry, "a")
    (again,) = await theirs.claim_idle(60, 1)
    assert (await theirs.begin(again, "a", None)).deaths == 1


async def test_what_was_delivered_in_this_very_millisecond_is_idle_for_0(make_queue, push, monkeypatch):
    """This holds on fakeredis too, which is corrected, so a test may claim at once what it delivers."""
    monkeypatch.setattr("fakeredis.model._stream.current_time", lambda: 1_700_000_000_000)
    await push(Job(id="a", prompt="x"))
    entry = await take(make_queue("w1"))
    assert await make_queue("w2").claim_idle(0, 1) == [entry]


@pytest.mark.parametrize("job_id", ["", "other", "foreign"])
async def test_an_entry_of_no_or_another_job_is_handed_over_and_no_record_is_touched(
    make_queue, push, client, keys, job_id
):
    ours = make_queue("w1")
    await push(Job(id="other", prompt="x"))
    other = await take(ours)
    await ours.begin(other, "other", None)
    await client.set(keys.job("foreign"), "x")
    await push(b"junk")
    entry = await take(ours)
    assert await ours.release_unbegun(entry, job_id)
    assert await holder(ours, keys, client, entry) == RELEASED
    assert await client.hmget(keys.job("other"), "status", "worker") == [b"running", b"w1"]
    assert not await ours.release_unbegun(entry, job_id), "it is not ours any more"
