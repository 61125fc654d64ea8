"""Actions that a worker must avoid right after an outage of its server."""

import pytest

import ingine.worker.contact
from ingine.contract.record import JobStatus
from ingine.worker.contact import REMEMBERED_S, Contact
from ingine.worker.leases import RENEWALS_PER_LEASE
from tests.waiting import wait_until_async
from tests.worker.test_pause import Turns, dead_workers_job


class Clock:
    def __init__(self, monkeypatch):
        monkeypatch.setattr(ingine.worker.contact.time, "monotonic", lambda: self.now_s)
        self.now_s = 100.0


@pytest.fixture
def clock(monkeypatch) -> Clock:
    return Clock(monkeypatch)


def answered(contact: Contact, clock: Clock, at_s: float, **waited) -> None:
    clock.now_s = at_s
    contact.made(**waited)


def test_a_contact_knows_after_what_silence_the_server_came_back(clock):
    contact = Contact()
    answered(contact, clock, 101.0)
    assert not contact.returned(after_s=2.0, within_s=5.0), "a second is no outage"
    clock.now_s = 111.0
    assert not contact.returned(after_s=2.0, within_s=5.0), "it is still away"
    answered(contact, clock, 111.0)
    answered(contact, clock, 113.0)
    assert contact.returned(after_s=10.0, within_s=5.0) and not contact.returned(after_s=10.1, within_s=5.0)
    clock.now_s = 116.0
    assert contact.returned(after_s=10.0, within_s=5.0)
    clock.now_s = 116.1
    assert not contact.returned(after_s=10.0, within_s=5.0), "that was long ago"


def test_a_wait_that_was_asked_for_is_no_silence(clock):
    contact = Contact()
    answered(contact, clock, 101.0, waited_s=1.0)
    assert not contact.returned(after_s=0.0, within_s=5.0)
    answered(contact, clock, 103.0, waited_s=1.0)
    assert contact.returned(after_s=1.0, within_s=5.0) and not contact.returned(after_s=1.1, within_s=5.0)


def test_a_contact_remembers_no_more_than_it_is_asked_about(clock):
    contact = Contact()
    for number in range(1, 500):
        answered(contact, clock, 100.0 + number)
    assert len(contact._returns) <= REMEMBERED_S + 1


async def test_the_living_may_renew_before_their_jobs_are_taken_for_left_behind(harness, monkeypatch):
    worker = await harness(lease_s=1.5)
    asked, away = [], True

    def returned(**how) -> bool:
        asked.append(how)
        return away

    monkeypatch.setattr(worker.queue.contact, "returned", returned)
    monkeypatch.setattr("ingine.worker.intake.SWEEP_INTERVAL_S", 0.0)
    await Turns(worker.worker._partitions[0].intake).pass_by()
    await dead_workers_job(worker, "a")
    num_asked = len(asked)
    await wait_until_async(lambda: len(asked) > num_asked + 2, what="sweeps that came to nothing")
    assert await worker.redis.hget(worker.keys.job("a"), "attempt") == b"1"
    assert asked[0] == {"after_s": 1.5 / 2, "within_s": 1.5 / RENEWALS_PER_LEASE}
    away = False
    assert (await worker.end("a")).status is JobStatus.FINISHED


async def test_the_shortest_lease_is_not_taken_for_an_outage(harness):
    """An intake without work asks its server to wait, for half of such a lease."""
    worker = await harness(lease_s=0.5)
    await Turns(worker.worker._partitions[0].intake).pass_by()
    await dead_workers_job(worker, "a")
    assert (await worker.end("a")).timings["attempts"] == 2
