"""A change of the number of partitions that fails or is refused, at each of its steps."""

import pytest
from redis.asyncio import Redis

from ingine.contract.keys import Keys, all_partitions, partition_of
from ingine.producer import AsyncClient, ClientError, ServerUnavailable
from ingine.producer.partitions import Partition
from ingine.producer.repartition import _Repartition

FEW, MANY = 2, 4
CALLS_BEFORE_CLOSING = 1 + FEW + 1 + (MANY - FEW)
"""Calls before closing: the old number, a look at each partition, the settings, and the new partitions."""


async def numbers(redis: Redis, queue: str) -> list[bytes | None]:
    """The numbers that producers read: in the queue's own settings, and in those of each partition."""
    places = (Keys(queue), *all_partitions(queue, MANY))
    return [await redis.hget(keys.settings, "partitions") for keys in places]


def id_in_last(number: int, name: str = "job") -> str:
    names = (f"{name}-{n}" for n in range(10_000))
    return next(name for name in names if partition_of(name, number) == number - 1)


async def break_off_after(num_calls: int, client: AsyncClient, number: int) -> bool:
    """Fail after so many calls. Returns True if the change was complete by then."""
    call, num_made = Partition.call, 0

    async def call_or_break(self, command):
        nonlocal num_made
        num_made += 1
        if num_made > num_calls:
            raise ServerUnavailable("away")
        return await call(self, command)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Partition, "call", call_or_break)
        try:
            await client.set_partitions(number)
        except ServerUnavailable:
            return False
    return True


async def test_whenever_it_breaks_off_it_can_be_made_again(client: AsyncClient, redis: Redis, queue: str):
    await client.set_partitions(FEW)
    for num_calls in range(100):
        is_through = await break_off_after(num_calls, client, MANY)
        if num_calls <= CALLS_BEFORE_CLOSING:
            assert (await numbers(redis, queue))[: 1 + FEW] == [b"%d" % FEW] * (1 + FEW)
            await (await client.submit("still accepted")).cancel()
        await client.set_partitions(MANY)
        assert await numbers(redis, queue) == [b"%d" % MANY] * (1 + MANY)
        await (await client.submit("hi", job_id=id_in_last(MANY, f"round-{num_calls}"))).cancel()
        if is_through:
            break
        await client.set_partitions(FEW)
    assert is_through and num_calls > CALLS_BEFORE_CLOSING


async def test_a_job_that_comes_in_meanwhile_opens_again_what_was_closed(
    client: AsyncClient, redis: Redis, queue: str, monkeypatch: pytest.MonkeyPatch
):
    await client.set_partitions(FEW)
    copy_settings = _Repartition.copy_settings

    async def submit_and_copy(self):
        await client.submit("hi", job_id=id_in_last(FEW))
        return await copy_settings(self)

    monkeypatch.setattr(_Repartition, "copy_settings", submit_and_copy)
    with pytest.raises(ClientError, match=r"not empty \(1 jobs in .*\): nothing was changed"):
        await client.set_partitions(MANY)
    assert (await numbers(redis, queue))[: 1 + FEW] == [b"%d" % FEW] * (1 + FEW)
    await client.submit("still accepted")
