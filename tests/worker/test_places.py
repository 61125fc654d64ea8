"""Places of a worker: each choice of a job takes one, in what is delivered and in what a worker has."""

import pytest

from ingine.contract.entries import count_choices
from ingine.contract.jobs import Job, decode_job, encode_job
from ingine.contract.keys import Priority
from ingine.worker.queue import Queue
from tests.served_models import OTHER, TINY
from tests.worker.test_intake import intake_of


async def add(client, keys, name: str, priority: Priority = Priority.NORMAL, **fields: object) -> None:
    """Add an entry by XADD, with these fields beside the job."""
    job = Job(id=name, prompt="x", model=fields.pop("model", None))
    await client.xadd(keys.jobs(priority), {"job": encode_job(job)} | fields)


async def take(queue: Queue, num_places: int) -> list[str]:
    return [decode_job(entry.raw).id for entry in await queue.take(num_places)]


async def test_entries_are_taken_until_their_choices_fill_the_places(client, keys, make_queue):
    queue = make_queue("w1")
    for number in range(4):
        await add(client, keys, f"urgent-{number}", Priority.HIGH, choices=3)
        await add(client, keys, f"patient-{number}", Priority.LOW)
    assert await take(queue, 8) == ["urgent-0", "urgent-1", "urgent-2"]
    assert await take(queue, 5) == ["urgent-3", "patient-0", "patient-1"]


async def test_abandoned_entries_are_claimed_until_their_choices_fill_the_places(client, keys, make_queue):
    dead, heir = make_queue("dead"), make_queue("heir")
    for number in range(3):
        await add(client, keys, f"normal-{number}", choices=3)
    await add(client, keys, "low", Priority.LOW)
    assert len(await dead.take(100)) == 4
    assert count_choices(await heir.claim_idle(0, 4)) == 6
    assert len(await dead.claim_idle(0, 100)) == 4


async def test_parked_entries_are_claimed_until_their_choices_fill_the_places(client, keys, make_queue):
    first, second = make_queue("first", OTHER), make_queue("second", TINY)
    for number in range(6):
        await add(client, keys, f"named-{number}", model="other", choices=3)
    for number, entry in enumerate(await second.take(100)):
        await second.park(entry, f"named-{number}", ("other", "gone")[number % 2])
    first.model_wait_s = 0.0
    first.look_for_parked()
    assert [len(await first.take(4)) for _ in range(4)] == [2, 2, 2, 0]


async def test_a_job_of_many_choices_takes_the_one_free_place_in_its_turn(client, keys, make_queue):
    """Jobs of one choice, of which there are always more, do not overtake it."""
    queue = make_queue("w1")
    for number in range(10):
        await add(client, keys, f"small-{number}", tenant="small", cost=10)
    await add(client, keys, "wide", tenant="wide", cost=160, choices=16)
    order = []
    for number in range(10, 20):
        order += await take(queue, 1)
        await add(client, keys, f"small-{number}", tenant="small", cost=10)
    assert "wide" in order[:2]


async def test_tenants_get_equal_tokens_however_many_choices_their_jobs_have(client, keys, make_queue):
    """All ask for more than the engine's longest sequence, so that each choice counts for that."""
    queue = make_queue("w1", max_cost=100)
    for number in range(40):
        await add(client, keys, f"wide-{number}", tenant="wide", cost=10**9, choices=8)
        await add(client, keys, f"small-{number}", tenant="small", cost=10**9)
    names = [name for _ in range(36) for name in await take(queue, 1)]
    num_wide = sum(name.startswith("wide") for name in names)
    assert num_wide == 4 and len(names) == 36, "8 jobs of one choice for each job of 8"


async def test_a_number_of_choices_that_is_forged_slows_its_own_tenant_only(client, keys, make_queue):
    queue = make_queue("w1", max_cost=100)
    for number in range(5):
        await add(client, keys, f"forged-{number}", tenant="forged", cost=10**9, choices="9" * 15)
    for number in range(100):
        await add(client, keys, f"honest-{number}", tenant="honest", cost=100)
    names = []
    while len(names) < 90:
        names += await take(queue, 32)
    assert sum(name.startswith("forged") for name in names) == 1


@pytest.mark.parametrize("wrong", ["0", "-1", "1.5", "x", "", "08", "9" * 16, "1e2", b"\xff"])
async def test_a_field_that_is_no_number_counts_as_one_choice(client, keys, make_queue, wrong):
    queue = make_queue("w1", max_cost=100)
    for name in ("a", "b", "c"):
        await add(client, keys, name, tenant="t", cost=10**9, choices=wrong)
    entries = await queue.take(2)
    assert [entry.num_choices for entry in entries] == [1, 1]
    assert await client.zscore(keys.ends("normal"), "tenant:t") == 300


@pytest.mark.parametrize(("room", "num_admitted"), [(0, 0), (1, 1), (3, 1), (4, 2), (5, 3)])
async def test_a_waiting_read_is_admitted_until_its_choices_fill_the_places(
    client, keys, make_queue, room, num_admitted
):
    queue = make_queue("w1")
    for priority, num_choices in [(Priority.HIGH, 3), (Priority.NORMAL, 1), (Priority.LOW, 4)]:
        await add(client, keys, f"job-{priority}", priority, choices=num_choices)
    entries = await queue.wait_for_new(0.01)
    intake, admission = intake_of(queue, room)
    await intake._admit_surplus(entries)
    assert admission.admitted == [entry.id for entry in entries[:num_admitted]]
    assert {entry.id for entry in await make_queue("w2").claim_idle(60, 100)} == {
        entry.id for entry in entries[num_admitted:]
    }


async def test_what_a_read_has_beyond_its_places_is_reserved_until_it_is_admitted(
    client, keys, make_queue, monkeypatch
):
    """Otherwise another partition would take jobs for places that are not free any more."""
    queue = make_queue("w1")
    await add(client, keys, "wide", choices=5)
    intake, admission = intake_of(queue, room=4)
    admit, rooms = admission.admit, []

    async def observed(*args, **options) -> bool:
        admission._max_num_jobs = 6
        rooms.append(admission.room)
        return await admit(*args, **options)

    monkeypatch.setattr(admission, "admit", observed)
    assert await intake._take()
    assert rooms == [1] and admission.room == 6
