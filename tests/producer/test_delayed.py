"""A delayed job is in no stream: its record holds all of it."""

from redis.asyncio import Redis

from ingine.contract.events import decode_event
from ingine.contract.keys import Keys
from ingine.contract.record import JobStatus
from tests.producer.conftest import Face


async def test_the_status_of_a_delayed_job_can_be_read(face: Face):
    handle = await face("submit", "not now", not_before_s=60)
    assert (await face("status", handle.job_id)).status is JobStatus.DELAYED


async def test_a_delayed_job_can_be_cancelled(face: Face, redis: Redis, keys: Keys):
    handle = await face("submit", "not now", not_before_s=60, metadata={"row": 3})
    assert await face("cancel", handle.job_id) == "cancelled"
    ((entry, fields),) = await redis.xrange(keys.tokens(handle.job_id))
    end = decode_event(fields[b"event"])
    assert (entry, end.status, end.metadata) == (b"0-1", JobStatus.CANCELLED, {"row": 3})
    assert not await redis.exists(keys.delayed) and not await redis.exists(keys.bytes)
