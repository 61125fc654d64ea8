"""One job as a whole, for gateways to other protocols."""

import pytest

from ingine.contract.events import TerminalEvent
from ingine.producer import JobNotFound
from ingine.producer.events import delete_job, follow_events, submitted_job


async def test_events_are_those_of_the_log(client, worker):
    handle = await client.submit("hi")
    job = await worker.take()
    await worker.run(job.id, 3)
    events = [event async for event in follow_events(client, handle.job_id, 1)]
    assert [event.position for event in events] == [2, 3, 3]
    assert isinstance(events[-1], TerminalEvent)


async def test_a_job_can_be_read_until_it_has_ended(client, worker):
    handle = await client.submit("hi", metadata={"a": 1})
    assert (await submitted_job(client, handle.job_id)).metadata == {"a": 1}
    later = await client.submit("later", not_before_s=3600)
    assert (await submitted_job(client, later.job_id)).prompt == "later"
    job = await worker.take()
    assert (await submitted_job(client, job.id)).prompt == "hi"
    await worker.run(job.id, 1)
    assert await submitted_job(client, job.id) is None
    with pytest.raises(JobNotFound):
        await submitted_job(client, "none")


async def test_only_a_job_that_has_ended_is_deleted(client, worker, redis, keys):
    handle = await client.submit("hi")
    assert await delete_job(client, handle.job_id) == "queued"
    job = await worker.take()
    assert await delete_job(client, job.id) == "running"
    await worker.run(job.id, 2)
    assert await delete_job(client, job.id) == "deleted"
    assert await redis.exists(keys.job(job.id), keys.tokens(job.id)) == 0
    with pytest.raises(JobNotFound):
        await delete_job(client, job.id)
