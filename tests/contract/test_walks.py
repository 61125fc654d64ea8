"""Fixed walks of the machine, each along calls that would reveal a certain fault."""

import contextlib
from collections.abc import Iterator

import pytest

from ingine.contract.keys import Priority
from ingine.contract.record import JobStatus
from tests.contract.fair_order import Entry
from tests.contract.machine import DEEDS, Contract
from tests.contract.model import MAX_DEATHS
from tests.contract.test_contract import real_contract

NORMAL = Priority.NORMAL


@pytest.fixture
def walk(redis_url):
    """A machine driven by the test.

    The server is compared with the model after the walk, and once drained.
    """

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


def begun(machine: Contract, job_id: str = "a"):
    return machine._begin(taken(machine, job_id), alone=False)


def test_a_released_job_goes_on_elsewhere_at_once(walk):
    with walk() as machine:
        attempt = begun(machine)
        machine.append(attempt, 0, 2, twice=True)
        machine.release(attempt)
        machine.release(attempt)  # its reply was lost
        (delivered,) = machine._claim("w2", 1)
        heir = machine._begin(delivered, alone=False)
        machine.release(attempt)  # and again, now that another worker has the job
        machine.append(heir, 0, 1, twice=False)
        assert (machine.model.records["a"].deaths, machine.model.records["a"].worker) == (0, "w2")


def test_an_entry_that_is_released_unbegun_counts_no_attempt(walk):
    with walk() as machine:
        delivered = taken(machine)
        machine.release_unbegun(delivered)
        machine.release_unbegun(delivered)
        (again,) = machine._claim("w2", 1)
        machine.release_unbegun(delivered)
        assert machine._begin(again, alone=False).number == 1


def test_a_renewed_lease_is_not_claimed(walk):
    with walk() as machine:
        held, silent = begun(machine, "a"), begun(machine, "b")
        machine.fall_silent("w1")
        machine.renew_one(held)
        assert [delivered.job_id for delivered in machine._claim("w2", 5)] == ["b"]
        machine.renew([held, silent])  # the second is still its own: no worker has begun it
        machine.cancel("a")
        machine.renew_one(held)


def test_a_lease_is_not_renewed_once_the_job_has_ended_or_is_another_s(walk):
    with walk() as machine:
        ended, lost = begun(machine, "a"), begun(machine, "b")
        machine.finish(ended, 0, JobStatus.FINISHED, twice=True, code=None)
        machine._die("w1", "w2")
        machine.renew([ended, lost])


def test_consumers_are_forgotten_unless_something_is_pending_with_them(walk):
    with walk() as machine:
        attempt = begun(machine)
        machine.keep_house()
        machine.renew_one(attempt)
        machine.release(attempt)
        machine.keep_house()
        assert [delivered.job_id for delivered in machine._claim("w2", 1)] == ["a"]


@pytest.mark.parametrize("position", [0, 2])
def test_a_delayed_job_is_cancelled_at_once_unless_it_has_tokens(walk, position):
    with walk() as machine:
        attempt = begun(machine)
        if position:
            machine.append(attempt, 0, position, twice=False)
        machine.delay(attempt, None)
        machine.cancel("a")
        machine.cancel("a")
        machine.promote(0, due=False)
        assert machine.model.records["a"].status is (JobStatus.QUEUED if position else JobStatus.CANCELLED)


def test_a_job_that_was_submitted_for_later_is_cancelled_with_its_key_and_deadline(walk):
    with walk() as machine:
        options = {"reply_to": "batch", "key": "k1", "delayed": True, "deadline": True}
        machine.submit("a", NORMAL, None, 1, **options)
        machine.cancel("a")
        machine.expire("a", overdue=True)
        machine.let_the_result_expire(0)
        machine.submit("a", NORMAL, None, 1, **options)
        machine.cancel("a")


@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed[0])
def test_whoever_ran_a_job_that_has_expired_is_fenced(walk, deed):
    with walk() as machine:
        machine.submit("a", NORMAL, None, 1, "batch", None, False, deadline=True)
        (delivered,) = machine._take("w1", 1)
        attempt = machine._begin(delivered, alone=False)
        machine.expire("a", overdue=True)
        assert machine.model.records["a"].status is JobStatus.RUNNING, "it has a holder"
        machine.fall_silent("w1")
        machine.expire("a", overdue=True)
        machine.expire("a", overdue=True)
        name, *arguments = deed
        getattr(machine, name)(attempt, *arguments)
        assert machine.model.records["a"].status is JobStatus.EXPIRED


@pytest.mark.parametrize("consumer", ["w1", "waiting", "released"])
def test_what_a_deleted_consumer_had_is_adopted(walk, consumer):
    with walk() as machine:
        runs, released = begun(machine, "a"), begun(machine, "b")
        machine.release(released)
        for job_id in "cde":
            machine.submit_bare(job_id, NORMAL, None)
        machine._take("w2", 1)
        machine.delete_a_consumer(consumer)
        machine.adopt()
        machine.renew_one(runs)
        machine.append(runs, 0, 1, twice=False)


@pytest.mark.parametrize("delayed", [False, True])
def test_an_entry_says_how_many_choices_its_job_has_wherever_it_goes(walk, delayed):
    """Through a delay, a pause after a failed step, a release and the dead letters."""

    def entry() -> Entry:
        (only,) = machine.model.streams[NORMAL].entries.values()
        return only

    with walk() as machine:
        machine.submit("a", NORMAL, "gold", 1, None, None, delayed, n=3)
        if delayed:
            machine.promote(0, due=True)
        attempt = machine._begin(machine._take("w1", 1)[0], alone=False)
        machine.delay(attempt, None)
        machine.promote(0, due=True)
        attempt = machine._begin(machine._take("w1", 1)[0], alone=False)
        machine.release(attempt)
        attempt = machine._begin(machine._claim("w2", 1)[0], alone=False)
        assert entry().choices == "3"
        machine.finish(attempt, 0, JobStatus.FAILED, twice=False, code="worker_lost")
        machine.let_the_result_expire(0)
        machine.requeue(0)
        assert entry().choices == "3"


def test_entries_are_delivered_while_a_place_is_free(walk):
    with walk() as machine:
        machine.flood(NORMAL, None, [1, 1, 1, 1], choices="3")
        assert [len(machine._take("w1", 4)) for _ in range(3)] == [2, 2, 0]
        machine.fall_silent("w1")
        assert [len(machine._claim("w2", num_places)) for num_places in (1, 3, 4)] == [1, 1, 2]


def test_the_most_urgent_entries_fill_the_places_first(walk):
    with walk() as machine:
        machine.flood(Priority.LOW, None, [1, 1])
        machine.flood(NORMAL, None, [1, 1], choices="3")
        machine.flood(Priority.HIGH, None, [1, 1], choices="2")
        taken = [delivered.entry.priority for delivered in machine._take("w1", 5)]
        assert taken == [Priority.HIGH, Priority.HIGH, NORMAL]


@pytest.mark.parametrize("wrong", ["0", "-2", "2.0", "x", "9" * 16])
def test_a_wrong_number_of_choices_is_one(walk, wrong):
    with walk() as machine:
        machine.flood(NORMAL, None, [1, 1, 1], choices=wrong)
        assert len(machine._take("w1", 2)) == 2


def test_no_number_of_choices_keeps_an_entry_from_being_taken(walk):
    """A forged number ends the read, and the next read goes on."""
    with walk() as machine:
        machine.flood(NORMAL, "flood", [1, 1], choices="9" * 15)
        machine.flood(NORMAL, "gold", [1, 1])
        assert [len(machine._take("w1", 4)) for _ in range(2)] == [1, 3]


def test_a_worker_reads_its_own_entries_in_pages(walk):
    """Each page has entries of all priorities that have any left."""
    with walk() as machine:
        machine.flood(Priority.LOW, None, [1])
        for _ in range(3):
            machine.flood(Priority.HIGH, None, [1, 1, 1, 1])
        assert len(machine._take("w1", 100)) == 13
        machine.read_own_pending("w1")
