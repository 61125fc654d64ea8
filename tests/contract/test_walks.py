"""Walks of the machine that must not be left to chance: each takes the way that a fault would show on."""

import contextlib
from collections.abc import Iterator

import pytest

from ingine.keys import Priority
from ingine.wire import JobStatus
from tests.contract.machine import DEEDS, Contract
from tests.contract.model import MAX_DEATHS
from tests.contract.test_contract import real_contract

NORMAL = Priority.NORMAL


@pytest.fixture
def walk(redis_url):
    """A machine to be led by hand: the server is compared with the model after the walk, and once drained."""

    @contextlib.contextmanager
    def start() -> Iterator[Contract]:
        machine = real_contract(redis_url)()
        try:
            yield machine
            machine.the_server_holds_what_the_model_says()
            machine.drain()
        finally:
            machine.calls.close()

    return start


def taken(machine: Contract, job_id: str = "a"):
    machine.submit_bare(job_id, NORMAL, "batch")
    (delivered,) = machine._take("w1", 1)
    return delivered


@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed[0])
def test_an_attempt_that_the_server_has_forgotten_is_fenced(walk, deed):
    with walk() as machine:
        machine.lose_the_last_second(taken(machine), "w2", deed)
        assert machine.model.records["a"].worker == "w2"


@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed[0])
def test_a_zombie_is_fenced(walk, deed):
    with walk() as machine:
        zombie = machine._begin(taken(machine), alone=False)
        machine.append(zombie, 0, 2, twice=True)
        machine._die("w1", "w2")
        name, *arguments = deed
        getattr(machine, name)(zombie, *arguments)
        assert machine.model.records["a"].worker == "w2"


def test_a_job_that_has_caused_its_last_death_need_not_be_alone_to_end(walk):
    with walk() as machine:
        machine._begin(taken(machine), alone=False)
        for dead, heir in [("w1", "w2"), ("w2", "w3")]:
            assert machine._die(dead, heir, alone=True)
        assert machine._die("w3", "w1", alone=False)
        assert machine.model.records["a"].deaths == MAX_DEATHS


@pytest.mark.parametrize("delayed", [False, True])
@pytest.mark.parametrize("limit", ["max_jobs", "max_bytes", "max_job_bytes"])
@pytest.mark.parametrize("room", [-1, 0, 1])
def test_a_limit_is_what_it_says(walk, limit, delayed, room):
    with walk() as machine:
        machine.submit_at_a_limit(NORMAL, "gold", delayed, True, None, 0)
        machine.submit_at_a_limit(NORMAL, "gold", delayed, True, limit, room)
        assert len(machine.model.records) == (1 if room < 0 else 2)


def test_a_queue_is_not_empty_while_a_job_is_delayed_or_a_letter_lies_there(walk):
    with walk() as machine:
        machine.keep_house()
        machine.submit_at_a_limit(NORMAL, None, True, False, None, 0)
        machine.keep_house()
        machine.cancel("new-1")
        machine.keep_house()
        machine.submit_rubbish(NORMAL, b"\xc1")
        machine.bury(machine._take("w1", 1)[0])
        machine.keep_house()
        assert machine.model.dead and not machine.model.num_jobs


def test_a_dead_letter_is_requeued_once_its_job_is_forgotten(walk):
    with walk() as machine:
        attempt = machine._begin(taken(machine), alone=True)
        machine.finish(attempt, 0, JobStatus.FAILED, twice=True, code="worker_lost")
        machine.requeue(0)
        assert machine.model.dead
        machine.let_the_result_expire(0)
        machine.requeue(0)
        assert not machine.model.dead and machine.model.num_jobs == 1


def test_a_tenant_that_comes_late_is_owed_nothing(walk):
    with walk() as machine:
        machine.flood(NORMAL, "flood", [5, 5, 5, 5])
        machine._take("w1", 2)
        machine.flood(NORMAL, None, [2, 2, 2, 2])
        machine.flood(NORMAL, "gold", [9, 9])
        for _ in range(8):
            machine._take("w2", 1)
