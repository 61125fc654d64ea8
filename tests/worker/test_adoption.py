"""Recovery of a jobs stream and its group after operators changed them by hand."""

import pytest

from ingine.connect.scripts import run_script
from ingine.contract.calls.running import Append, Finish, Refusal, renew
from ingine.contract.events import TerminalEvent, TokensEvent
from ingine.contract.jobs import Job, decode_job, encode_job
from ingine.contract.keys import GROUP, RELEASED, WAITING, Priority
from ingine.contract.record import JobStatus
from ingine.worker.job_streams import MAX_ORDERED
from ingine.worker.queue import Queue
from tests.worker.conftest import take


async def add(client, keys, name: str, tenant: str = "t", priority: str = "normal") -> str:
    fields = {"job": encode_job(Job(id=name, prompt="x")), "tenant": tenant, "cost": 10}
    return (await client.xadd(keys.jobs(priority), fields)).decode()


async def taken(queue: Queue, count: int) -> list[str]:
    return [decode_job(entry.raw).id for entry in await queue.take(count)]


async def adopt(queue: Queue) -> int:
    """All pages."""
    total, more = 0, True
    while more:
        number, more = await queue.adopt()
        total += number
    return total


async def holders(client, keys, priority: str = "normal") -> dict[str, list[str]]:
    stream, found = keys.jobs(priority), {}
    for pending in await client.xpending_range(stream, GROUP, "-", "+", 1000):
        ((_, fields),) = await client.xrange(stream, pending["message_id"], pending["message_id"])
        found.setdefault(pending["consumer"].decode(), []).append(decode_job(fields[b"job"]).id)
    return found


async def test_jobs_that_wait_outlive_the_consumer_that_holds_them(client, keys, make_queue):
    """They keep their order, so a tenant that floods gains nothing by it."""
    queue = make_queue("w1")
    for name in ("flood-0", "flood-1", "flood-2", "flood-3"):
        await add(client, keys, name, "flood")
    assert await taken(queue, 1) == ["flood-0"]
    await add(client, keys, "small-0", "small")
    await client.xgroup_delconsumer(keys.jobs("normal"), GROUP, WAITING)
    assert await adopt(make_queue("new")) == 3
    assert (await holders(client, keys))[WAITING] == ["flood-1", "flood-2", "flood-3"]
    assert await adopt(queue) == 0
    assert await taken(queue, 2) == ["small-0", "flood-1"]
    assert await taken(queue, 10) == ["flood-2", "flood-3"]


async def test_an_entry_that_was_deleted_unread_hides_none_that_nobody_has(client, keys, make_queue):
    """Redis 7.0 counts it as unread for ever."""
    queue = make_queue("w1")
    await add(client, keys, "a")
    entry = await take(queue)
    await queue.bury(entry, "x", "y")
    await client.xdel(keys.jobs("normal"), await add(client, keys, "b"))
    await add(client, keys, "c")
    await take(queue)
    await client.xgroup_delconsumer(keys.jobs("normal"), GROUP, "w1")
    assert await adopt(queue) == 1


async def test_the_order_is_taken_from_even_before_anybody_has_looked(client, keys, make_queue):
    queue = make_queue("w1")
    for name in "abc":
        await add(client, keys, name)
    assert await taken(queue, 1) == ["a"]
    await client.xgroup_delconsumer(keys.jobs("normal"), GROUP, WAITING)
    assert await taken(queue, 5) == ["b", "c"]
    assert (await holders(client, keys))["w1"] == ["a", "b", "c"]


async def test_a_dead_workers_jobs_outlive_its_consumer(client, keys, make_queue):
    dead, heir = make_queue("dead"), make_queue("heir")
    await add(client, keys, "a")
    entry = await take(dead)
    await dead.begin(entry, "a", None)
    await dead.append([Append("a", 1, TokensEvent(1, [7], "x"), publish=True)])
    await client.xgroup_delconsumer(keys.jobs("normal"), GROUP, "dead")
    assert await heir.claim_idle(0, 10) == []
    assert await adopt(heir) == 1
    assert await heir.claim_idle(3600, 10) == [], "whoever still runs it has a lease to say so"
    (claimed,) = await heir.claim_idle(0, 10)
    begun = await heir.begin(claimed, "a", None)
    assert (begun.attempt, begun.position, begun.deaths) == (2, 1, 1)


async def test_jobs_that_were_handed_over_outlive_the_consumer_that_holds_them(client, keys, make_queue):
    leaving, staying = make_queue("leaving"), make_queue("staying")
    await add(client, keys, "a")
    await leaving.begin(entry := await take(leaving), "a", None)
    await leaving.release(entry, "a", 1)
    await client.xgroup_delconsumer(keys.jobs("normal"), GROUP, RELEASED)
    assert await adopt(staying) == 1
    assert await holders(client, keys) == {RELEASED: ["a"]}
    (claimed,) = await staying.claim_idle(0, 1)
    assert (await staying.begin(claimed, "a", None)).deaths == 0


@pytest.mark.parametrize("how", ["XGROUP DELCONSUMER", "XACK"])
@pytest.mark.parametrize("adopted", [False, True])
async def test_a_living_worker_takes_its_jobs_back(client, keys, make_queue, how, adopted):
    worker = make_queue("w1")
    await add(client, keys, "a")
    await worker.begin(entry := await take(worker), "a", None)
    if how == "XACK":
        await client.xack(keys.jobs("normal"), GROUP, entry.id)
    else:
        await client.xgroup_delconsumer(keys.jobs("normal"), GROUP, "w1")
    if adopted:
        await adopt(make_queue("w2"))
    assert await run_script(client, renew(keys, [(entry, "a", 1)], worker_id="w1")) == [None]
    assert await holders(client, keys) == {"w1": ["a"]}
    assert await worker.append([Append("a", 1, TokensEvent(1, [7], "x"), publish=True)]) == [1]
    assert await worker.finish(Finish(entry, 1, TerminalEvent(1, JobStatus.FINISHED, "a"), None)) == 1
    assert await client.xlen(keys.jobs("normal")) == 0


async def test_what_a_moved_group_has_passed_over_is_found(client, keys, make_queue):
    queue = make_queue("w1")
    for name in "abc":
        await add(client, keys, name)
    await client.xgroup_setid(keys.jobs("normal"), GROUP, "$")
    assert await taken(queue, 5) == []
    assert await adopt(queue) == 3
    assert [decode_job(entry.raw).id for entry in await queue.claim_idle(0, 10)] == ["a", "b", "c"]


async def test_a_group_that_was_made_anew_delivers_everything_again(client, keys, make_queue):
    """The living are fenced, as if each had died: nobody else can know that they are there."""
    worker, other = make_queue("w1"), make_queue("w2")
    for name in "ab":
        await add(client, keys, name)
    await worker.begin(entry := await take(worker), "a", None)
    await client.xgroup_destroy(keys.jobs("normal"), GROUP)
    await other.create_groups()
    again = await other.take(5)
    assert [decode_job(e.raw).id for e in again] == ["a", "b"]
    assert (await other.begin(again[0], "a", None)).deaths == 1
    assert await worker.append([Append("a", 1, TokensEvent(1, [7], "x"), publish=True)]) == [Refusal.STALE]
    assert (await other.begin(again[1], "b", None)).deaths == 0
    assert await worker.release(entry, "a", 1) is False


async def test_a_place_that_was_lost_is_given_again(client, keys, make_queue):
    queue = make_queue("w1")
    ids = [await add(client, keys, name) for name in "abcd"]
    assert await taken(queue, 1) == ["a"]
    await client.zrem(keys.fair("normal"), ids[2])
    assert await taken(queue, 1) == ["b"]
    assert await adopt(queue) == 1
    assert await taken(queue, 5) == ["c", "d"]


async def test_a_deleted_entry_costs_nobody_else_anything(client, keys, make_queue):
    """Its job's bytes are gone with it, so it cannot run. It can be cancelled, and its deadline ends it."""
    queue = make_queue("w1")
    ids = [await add(client, keys, name) for name in "abc"]
    assert await taken(queue, 1) == ["a"]
    await client.xdel(keys.jobs("normal"), ids[1])
    await adopt(queue)
    assert await taken(queue, 5) == ["c"]
    assert await adopt(queue) == 0


async def test_a_healthy_queue_is_looked_at_without_reading_an_entry(client, keys, make_queue):
    """This includes queues with jobs that were cancelled while they waited."""
    queue = make_queue("w1")
    for number in range(MAX_ORDERED + 20):
        await add(client, keys, f"job-{number}")
    running = await queue.take(5)
    (waiting, *_) = await client.xpending_range(keys.jobs("normal"), GROUP, "-", "+", 1, WAITING)
    await client.xack(keys.jobs("normal"), GROUP, waiting["message_id"])
    await client.xdel(keys.jobs("normal"), waiting["message_id"])
    assert len(running) == 5
    assert await queue.adopt() == (0, False), "a walk would say that there are pages left"


async def test_a_long_stream_is_looked_at_a_page_at_a_time(client, keys, make_queue):
    queue, num_jobs = make_queue("w1"), 2 * MAX_ORDERED + 7
    for number in range(num_jobs):
        await add(client, keys, f"job-{number}")
    await queue.take(1)
    await client.xgroup_delconsumer(keys.jobs("normal"), GROUP, WAITING)
    pages = []
    while not pages or pages[-1][1]:
        pages.append(await queue.adopt())
    assert [number for number, _ in pages] == [MAX_ORDERED - 1, MAX_ORDERED, 7]
    assert len(await queue.take(num_jobs)) == num_jobs - 1


async def test_each_priority_is_looked_at(client, keys, make_queue):
    queue = make_queue("w1")
    for priority in Priority:
        await add(client, keys, f"job-{priority}", priority=priority)
        await client.xgroup_setid(keys.jobs(priority), GROUP, "$")
    assert await adopt(queue) == 3
    assert len(await queue.claim_idle(0, 10)) == 3


async def test_a_lost_reply_does_no_harm(client, keys, make_queue):
    queue = make_queue("w1")
    await add(client, keys, "a")
    await client.xgroup_setid(keys.jobs("normal"), GROUP, "$")
    assert [await adopt(queue) for _ in range(2)] == [1, 0]
    assert await holders(client, keys) == {RELEASED: ["a"]}


async def test_what_is_missing_is_found_though_the_server_cannot_tell_how_much_is_unread(
    client, keys, make_queue
):
    """It cannot once an entry is deleted that nobody has read: a job that was cancelled."""
    queue = make_queue("w1")
    for name in "abc":
        await add(client, keys, name)
    await queue.take(3)
    unread = [await add(client, keys, name) for name in "xyz"]
    await client.xdel(keys.jobs("normal"), unread[1])
    assert await adopt(queue) == 0
    await client.xgroup_delconsumer(keys.jobs("normal"), GROUP, "w1")
    assert await adopt(queue) == 3
    assert await taken(queue, 5) == ["x", "z"]
