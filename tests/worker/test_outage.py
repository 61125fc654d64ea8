"""What a worker must not do right after its server was away."""

import asyncio

import worker.contact
from tests.waiting import wait_until_async
from worker.contact import Contact
from worker.intake import Intake
from worker.leases import RENEWALS_PER_LEASE


def at(monkeypatch, seconds: float) -> None:
    monkeypatch.setattr(worker.contact.time, "monotonic", lambda: seconds)


def test_a_contact_knows_after_what_silence_the_server_came_back(monkeypatch):
    at(monkeypatch, 100.0)
    contact = Contact()
    at(monkeypatch, 101.0)
    contact.made()
    assert not contact.returned(after_s=2.0, within_s=5.0)
    at(monkeypatch, 111.0)
    assert not contact.returned(after_s=2.0, within_s=5.0)  # it is still away
    contact.made()
    at(monkeypatch, 113.0)
    contact.made()
    assert contact.returned(after_s=9.0, within_s=5.0) and not contact.returned(after_s=11.0, within_s=5.0)
    at(monkeypatch, 117.0)
    assert not contact.returned(after_s=9.0, within_s=5.0)


class Room:
    """An admission that always has room for one."""

    stopping, room, num_suspects = False, 1, 0

    def on_room(self, wake):
        pass

    def offer_room(self):
        pass

    def served(self, wake):
        pass

    def reserve(self, num_jobs):
        return self

    def __enter__(self):
        return 1

    def __exit__(self, *_):
        pass


class Queue:
    """A partition whose server may have just come back."""

    def __init__(self):
        self.keys = self.contact = self
        self.prefix = "q"
        self.has_just_returned, self.asked = True, []
        self.num_sweeps = self.num_promotions = 0

    def returned(self, **how) -> bool:
        self.asked.append(how)
        return self.has_just_returned

    async def take(self, count):
        return []

    async def claim_idle(self, min_idle_s, count):
        self.num_sweeps += 1
        return []

    async def expire_due(self):
        return False

    async def adopt(self):
        return 0, False

    async def promote(self):
        self.num_promotions += 1
        return False

    async def wait_for_new(self, timeout_s):
        await asyncio.sleep(0.01)
        return []


async def test_the_living_may_renew_before_their_jobs_are_taken_for_left_behind():
    queue, lease_s = Queue(), 1.5
    intake = asyncio.create_task(Intake(queue, Room(), lease_s=lease_s, num_partitions=1).run())
    try:
        await wait_until_async(lambda: queue.num_promotions >= 2)
        assert queue.num_sweeps == 0
        assert queue.asked[0] == {"after_s": lease_s / 2, "within_s": lease_s / RENEWALS_PER_LEASE}
        queue.has_just_returned = False
        await wait_until_async(lambda: queue.num_sweeps)
    finally:
        intake.cancel()
