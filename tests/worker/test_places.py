"""Places of a worker: each choice of a job takes one, in what is delivered and in what a worker has."""

import asyncio

import pytest

import ingine.worker.job_streams
from ingine.contract.calls.begin import Begun
from ingine.contract.entries import Entry, count_choices
from ingine.contract.events import TokensEvent
from ingine.contract.jobs import Job, decode_job, encode_job
from ingine.contract.keys import Priority
from ingine.producer import AsyncClient
from ingine.sampling_params import SamplingParams
from ingine.worker.jobs import RunningJob
from ingine.worker.queue import Queue
from tests.served_models import OTHER, TINY
from tests.waiting import wait_until_async
from tests.worker.test_choices import UNEVEN
from tests.worker.test_intake import intake_of
from tests.worker.test_worker import leave_behind


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
        admission._num_places = 6
        rooms.append(admission.room)
        return await admit(*args, **options)

    monkeypatch.setattr(admission, "admit", observed)
    assert await intake._take()
    assert rooms == [1] and admission.room == 6


# ----------------------------------------------------------------------------------------- workers

LONG = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
WIDE = LONG.model_copy(update={"n": 4})


async def submit(worker, name: str, sampling: SamplingParams, priority: Priority = Priority.NORMAL) -> None:
    """Submit as the producer library does."""
    async with AsyncClient(queue=worker.keys.queue, redis=worker.redis) as client:
        await client.submit("x", job_id=name, sampling=sampling, priority=priority)


async def began_at(worker, name: str) -> int:
    return int(await worker.redis.hget(worker.keys.job(name), "began_at") or 0)


async def hold(worker, monkeypatch) -> asyncio.Event:
    """Let no job get a token until the event is set: then nothing that runs ends meanwhile."""
    append, go_on = worker.queue.append, asyncio.Event()

    async def held(appends):
        await go_on.wait()
        return await append(appends)

    monkeypatch.setattr(worker.queue, "append", held)
    return go_on


def places_at_begin(worker, monkeypatch) -> dict[str, int]:
    """Places that were taken when each job began."""
    table, places = worker.worker._jobs, {}
    add = table.add

    def observed(job) -> None:
        places[job.id] = table.num_places
        add(job)

    monkeypatch.setattr(table, "add", observed)
    return places


async def test_a_worker_takes_jobs_of_several_choices_one_after_the_other(harness, tiny_engine, monkeypatch):
    """An urgent job that is submitted meanwhile is the next to begin, though wide jobs are older."""
    monkeypatch.setattr(ingine.worker.job_streams, "LOW_FIRST_EVERY", 10**9)
    worker = await harness(tiny_engine(max_num_seqs=4))
    go_on, places = await hold(worker, monkeypatch), places_at_begin(worker, monkeypatch)
    for number in range(3):
        await submit(worker, f"wide-{number}", WIDE)
    await wait_until_async(lambda: "wide-0" in places, what="the first job")
    assert worker.worker._admission.room == 0
    await submit(worker, "urgent", LONG, Priority.HIGH)
    go_on.set()
    for name in ("wide-0", "wide-1", "wide-2", "urgent"):
        assert (await worker.end(name)).status == "finished"
    assert set(places) == {"wide-0", "wide-1", "wide-2", "urgent"}
    assert max(places.values()) < 4, "a place was free whenever a job began"
    assert await began_at(worker, "urgent") <= await began_at(worker, "wide-1")
    assert worker.worker._jobs.num_places == 0


async def test_a_job_begins_with_fewer_places_than_choices(harness, tiny_engine, monkeypatch):
    """Three places are free for a job of four: one of its choices waits, and no other job is taken."""
    worker = await harness(tiny_engine(max_num_seqs=4))
    go_on, places = await hold(worker, monkeypatch), places_at_begin(worker, monkeypatch)
    await submit(worker, "small", LONG)
    await wait_until_async(lambda: "small" in places, what="the small job")
    for number in range(2):
        await submit(worker, f"wide-{number}", WIDE)
    await wait_until_async(lambda: "wide-0" in places, what="the wide job")
    assert (worker.worker._jobs.num_places, worker.worker._admission.room) == (5, 0)
    go_on.set()
    for name in ("small", "wide-0", "wide-1"):
        assert (await worker.end(name)).status == "finished"
    assert max(places.values()) < 4


async def test_a_choice_that_ends_frees_its_place(harness, tiny_engine, monkeypatch):
    worker = await harness(tiny_engine(max_num_seqs=4))
    table, places = worker.worker._jobs, []
    end_choice = table.end_choice

    def observed(job, output) -> None:
        end_choice(job, output)
        places.append(table.num_places)

    monkeypatch.setattr(table, "end_choice", observed)
    await submit(worker, "a", UNEVEN)
    await worker.end("a")
    assert places == [2, 1, 1], "the last is free once the job's end is written"
    assert table.num_places == 0


async def test_a_choice_that_ended_in_an_earlier_attempt_takes_no_place(harness, tiny_engine, monkeypatch):
    worker = await harness(tiny_engine(max_num_seqs=2))
    job = Job(id="a", prompt="Once", sampling=LONG.model_copy(update={"n": 2, "max_tokens": 400}))
    go_on = await hold(worker, monkeypatch)
    await leave_behind(worker, job, [TokensEvent(2, [72, 73], "HI", None, 0, 2, "stop", 73)])
    await wait_until_async(lambda: worker.worker._jobs.by_id("a"), what="the job is resumed")
    assert worker.worker._jobs.num_places == 1
    await submit(worker, "b", LONG)
    await wait_until_async(lambda: worker.worker._jobs.by_id("b"), what="the job beside it")
    go_on.set()
    assert (await worker.end("b")).status == "finished"
    assert (await worker.end("a")).status == "finished"


async def test_a_job_that_is_prepared_takes_a_place_for_each_choice(client, keys, make_queue):
    _, admission = intake_of(make_queue("w1"), room=9)
    job = Job(id="a", prompt="x", sampling=WIDE)
    entry = Entry(Priority.NORMAL, "1-0", encode_job(job))
    running = RunningJob(make_queue("w1"), job, entry, Begun("run", attempt=1), position=0)
    admission._preparation._tasks[running] = None
    assert admission.room == 5
