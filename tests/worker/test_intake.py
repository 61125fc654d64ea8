"""The intake, from a partition's streams to admission: its reads, and the entries that it cannot begin."""

import asyncio
import time
from functools import partial
from types import SimpleNamespace

import pytest
from redis.exceptions import ConnectionError

import ingine.worker.intake
import ingine.worker.queue
from ingine.contract.jobs import Job, encode_job
from ingine.contract.keys import GROUP, RELEASED, Keys, Priority
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode
from ingine.worker.admission import Admission
from ingine.worker.intake import Intake
from ingine.worker.job_streams import PENDING_PAGE
from ingine.worker.jobs import JobTable
from ingine.worker.leases import RENEWALS_PER_LEASE
from ingine.worker.preparation import Preparation
from tests.waiting import wait_until_async
from tests.worker.test_pause import Turns
from tests.worker.test_worker import GREEDY

LEASE_S = 2.0


class Door(Admission):
    """An admission that notes what comes through it. `broken`: entries at which the server is away."""

    def __init__(self, room: int):
        self.stats = SimpleNamespace(num_waiting=0, num_compiling=0)
        engine = SimpleNamespace(stats=self.stats, limits=SimpleNamespace(max_num_tokens=512))
        jobs = JobTable()
        preparation = Preparation(jobs, engine, None, None, None, expire=lambda job: None)
        super().__init__(jobs, engine, None, preparation, None, num_places=room, max_deaths=3)
        self.admitted, self.broken, self.suspects = [], set(), set()

    async def admit(self, queue, entry, max_job_bytes, *, alone=False) -> bool:
        self.admitted.append(entry.id)
        if entry.id in self.broken:
            raise ConnectionError("gone")
        return entry.id not in self.suspects


def intake_of(queue, room: int) -> tuple[Intake, Door]:
    door = Door(room)
    return Intake(queue, door, lease_s=LEASE_S, num_partitions=1), door


async def holders(client, keys, priority: Priority) -> list[str]:
    pending = await client.xpending_range(keys.jobs(priority), GROUP, "-", "+", 10)
    return [each["consumer"].decode() for each in pending]


async def test_what_a_waiting_read_brings_beyond_the_room_is_left_to_others(make_queue, push, client, keys):
    queue, peer = make_queue("w1"), make_queue("w2")
    for priority in Priority:
        await push(Job(id=f"job-{priority}", prompt="x"), priority)
    entries = await queue.wait_for_new(0.01)
    intake, door = intake_of(queue, room=1)
    await intake._admit_surplus(entries)
    assert door.admitted == [entries[0].id] and entries[0].priority is Priority.HIGH
    for priority in (Priority.NORMAL, Priority.LOW):
        assert await holders(client, keys, priority) == [RELEASED]
    assert {entry.id for entry in await peer.claim_idle(60, 5)} == {entry.id for entry in entries[1:]}


async def test_all_that_was_read_is_admitted_however_much(make_queue, push, monkeypatch):
    monkeypatch.setattr(ingine.worker.intake, "ENTRIES_AT_ONCE", 2)
    queue = make_queue("w1")
    for number in range(5):
        await push(Job(id=f"j{number}", prompt="x"))
    intake, door = intake_of(queue, room=9)
    assert await intake._take()
    assert len(set(door.admitted)) == len(door.admitted) == 5


async def test_an_error_of_one_comes_after_all_have_been_looked_at(make_queue, push):
    queue = make_queue("w1")
    for number in range(3):
        await push(Job(id=f"j{number}", prompt="x"))
    entries = await queue.take(3)
    intake, door = intake_of(queue, room=9)
    door.broken.add(entries[0].id)
    with pytest.raises(ConnectionError):
        await intake._admit_all(entries)
    assert door.admitted == [entry.id for entry in entries]


async def test_what_a_lost_reply_delivered_is_read_in_pages(make_queue, push, client, keys, monkeypatch):
    """An entry may have megabytes, and a worker thousands of them."""
    queue, num_jobs = make_queue("w1"), 30
    for number in range(num_jobs):
        await push(Job(id=f"job-{number}", prompt="x"), Priority.HIGH if number % 3 else Priority.LOW)
    entries = await queue.take(num_jobs)
    low = [entry for entry in entries if entry.priority == Priority.LOW]
    deleted = low[:PENDING_PAGE]  # a whole page has nothing but these
    await client.xdel(keys.jobs(Priority.LOW), *(entry.id for entry in deleted))
    xreadgroup, num_read = queue._redis.xreadgroup, []

    async def counted(*args, **options):
        reply = await xreadgroup(*args, **options)
        num_read.append(sum(len(page) for _, page in reply))
        return reply

    monkeypatch.setattr(queue._redis, "xreadgroup", counted)
    intake, door = intake_of(queue, room=num_jobs)
    intake._lost_delivery = True
    await intake._admit_lost()
    assert max(num_read) <= len(Priority) * PENDING_PAGE < num_jobs == sum(num_read)
    assert sorted(door.admitted) == sorted(entry.id for entry in entries if entry not in deleted)


async def test_what_a_lost_reply_delivered_is_asked_for_once(make_queue, push, monkeypatch):
    queue = make_queue("w1")
    take, own_pending, calls = queue.take, queue.own_pending, []

    async def take_and_lose(count):
        entries = await take(count)
        calls.append("take")
        if len(calls) == 1:
            raise ConnectionError("gone")
        return entries

    async def counted(after):
        calls.append("own")
        return await own_pending(after)

    monkeypatch.setattr(queue, "take", take_and_lose)
    monkeypatch.setattr(queue, "own_pending", counted)
    await push(Job(id="a", prompt="x"))
    intake, door = intake_of(queue, room=9)
    running = asyncio.create_task(intake.run())
    await wait_until_async(lambda: calls.count("take") >= 3, what="more turns")
    door.stopping = True
    intake.wake()
    await running
    assert calls.count("own") == 1 and len(door.admitted) == 1


async def test_many_due_jobs_are_promoted_without_waiting_for_the_next_sweep(
    make_queue, client, keys, monkeypatch
):
    monkeypatch.setattr(ingine.worker.intake, "SWEEP_INTERVAL_S", 3600)
    monkeypatch.setattr(ingine.worker.queue, "MAX_PROMOTED", 2)
    queue = make_queue("w1")
    for number in range(5):
        raw = encode_job(Job(id=f"j{number}", prompt="x"))
        await client.hset(
            keys.job(f"j{number}"), mapping={"status": "delayed", "raw": raw, "priority": "normal"}
        )
        await client.zadd(keys.delayed, {f"j{number}": 1})
    intake, door = intake_of(queue, room=9)
    for _ in range(3):
        await intake._take()
    assert await client.zcard(keys.delayed) == 0
    assert len(door.admitted) == 5


async def test_one_suspect_waits_here_and_is_renewed_in_time(make_queue, push, client, keys):
    queue = make_queue("w1")
    for name in "ab":
        await push(Job(id=name, prompt="x"))
    entries = await queue.take(2)
    intake, door = intake_of(queue, room=9)
    door.suspects = {entry.id for entry in entries}
    await intake._admit_all(entries)
    assert door.num_suspects == 1 and door.room == 0
    assert await holders(client, keys, Priority.NORMAL) == ["w1", RELEASED]
    await intake._admit_all(entries[:1])
    assert len(door.admitted) == 2, "the one that waits is known"
    with door.reserve(1):  # something else is under way
        await intake._serve_suspect(entries[0])
    assert len(door.admitted) == 3
    assert 0 < intake._renew_suspect_at - time.monotonic() <= LEASE_S / RENEWALS_PER_LEASE
    door.stopping = True
    await intake.run()
    assert door.num_suspects == 0
    assert await holders(client, keys, Priority.NORMAL) == [RELEASED] * 2


async def test_room_that_one_partition_has_no_use_for_is_offered_before_it_waits(monkeypatch):
    """While it looked, it had the only room. Another whose jobs wait shall have it, and not wait too."""
    monkeypatch.setattr(ingine.worker.intake, "BLOCK_S", 3600)
    door, offered, taken = Door(room=1), [], []
    looks, looked = asyncio.Event(), asyncio.Event()

    async def nothing(*_):
        return None

    async def no_more(*_):
        return False

    async def none_adopted():
        return 0, False

    def partition(take, wait_for_new):
        contact = SimpleNamespace(returned=lambda **_: True)
        chores = {"expire_due": no_more, "adopt": none_adopted, "promote": no_more, "tell_parked": nothing}
        calls = {"take": take, "wait_for_new": wait_for_new} | chores
        queue = SimpleNamespace(keys=Keys("q"), contact=contact, **calls)
        return Intake(queue, door, lease_s=LEASE_S, num_partitions=2)

    async def find_nothing(count):
        looks.set()
        await looked.wait()
        return []

    async def wait_here(timeout_s):
        for _ in range(50):
            await asyncio.sleep(0)
        offered.append(list(taken))
        return []

    async def take_there(count):
        taken.append(count)
        return []

    here, there = partition(find_nothing, wait_here), partition(take_there, wait_here)
    looking = asyncio.create_task(here._turn())
    await looks.wait()
    assert door.room == 0
    waiting = asyncio.create_task(there.run())
    await wait_until_async(lambda: there._next_adoption > 0, what="the other one's turn")
    assert not taken
    looked.set()
    await looking
    waiting.cancel()
    assert offered[0] == [1]


def test_room_is_offered_first_to_whoever_was_served_longest_ago():
    door, offered = Door(room=1), []
    wakers = {name: partial(offered.append, name) for name in "abc"}
    for wake in wakers.values():
        door.on_room(wake)
    for name in "ab":
        door.served(wakers[name])
    door.offer_room()
    assert offered == ["c", "a", "b"]


def test_there_is_no_room_while_sequences_wait_in_the_engine():
    door = Door(room=3)
    assert door.room == 3
    door.stats.num_waiting = 1
    assert door.room == 0


async def test_a_nudge_spares_waiting_for_the_next_sweep(harness, monkeypatch):
    monkeypatch.setattr(ingine.worker.intake, "SWEEP_INTERVAL_S", 3600)
    here = await harness()
    await Turns(here.worker._partitions[0].intake).pass_by()
    await here.redis.xgroup_createconsumer(here.keys.jobs("low"), GROUP, RELEASED)
    entry = "9999999999999-1"
    async with here.redis.pipeline(transaction=True) as pipe:
        job = encode_job(Job(id="a", prompt="x", sampling=GREEDY))
        pipe.xadd(here.keys.jobs("low"), {"job": job}, id=entry)
        pipe.xreadgroup(GROUP, RELEASED, {here.keys.jobs("low"): ">"})
        pipe.xclaim(here.keys.jobs("low"), GROUP, RELEASED, 0, [entry], idle=3_600_000)
        await pipe.execute()

    async def begun_after_a_nudge() -> bool:
        await here.queue.tell_released()  # again: the first may come before there is a listener
        return await here.redis.exists(here.keys.job("a"))

    await wait_until_async(begun_after_a_nudge, what="its begin")
    assert (await here.end("a")).status is JobStatus.FINISHED


async def test_what_was_accepted_is_held_to_no_later_limit(harness):
    here = await harness(max_job_bytes=64)
    accepted, bare = (Job(id=name, prompt="x" * 200, sampling=GREEDY) for name in ("accepted", "bare"))
    await here.redis.xadd(here.keys.jobs("normal"), {"job": encode_job(accepted), "cost": 9})
    await here.push(bare)
    assert (await here.end("accepted")).status is JobStatus.FINISHED
    (letter,) = await wait_until_async(here.dead_letters, what="a dead letter")
    assert letter[b"code"].decode() == ErrorCode.JOB_TOO_LARGE
