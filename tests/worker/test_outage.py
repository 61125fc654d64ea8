"""What a worker must not do right after the server was away."""

import asyncio
import time

from redis.exceptions import ConnectionError

from tests.waiting import wait_until_async
from worker.intake import Intake
from worker.leases import RENEWALS_PER_LEASE


class Room:
    """An admission that always has room for one."""

    stopping, room = False, 1

    def reserve(self, num_jobs):
        return self

    def __enter__(self):
        return 1

    def __exit__(self, *_):
        pass


class Queue:
    """A partition whose server is away at first; notes when each call came."""

    def __init__(self):
        self.keys = self
        self.prefix = "q"
        self.failed: list[float] = []
        self.swept: list[float] = []

    async def take(self, count):
        if len(self.failed) < 3:
            self.failed.append(time.monotonic())
            raise ConnectionError("away")
        return []

    async def claim_idle(self, min_idle_s, count):
        self.swept.append(time.monotonic())
        return []

    async def own_pending(self):
        return []

    async def promote(self):
        pass

    async def wait_for_new(self, timeout_s):
        await asyncio.sleep(0.01)
        return []


async def test_the_living_may_renew_before_their_jobs_are_taken_for_left_behind():
    queue, lease_s = Queue(), 6.0
    intake = asyncio.create_task(Intake(queue, Room(), lease_s=lease_s, num_partitions=1).run())
    await wait_until_async(lambda: len(queue.swept) > 1, what="the sweep after the outage")
    intake.cancel()
    first, after_the_outage, *_ = queue.swept
    assert first <= queue.failed[0]
    assert after_the_outage >= queue.failed[-1] + lease_s / RENEWALS_PER_LEASE
