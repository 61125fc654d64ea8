"""An entry with the greatest id that there is: behind it nobody can add another to the stream."""

import asyncio

import pytest
import redis.asyncio
from redis.exceptions import ResponseError

from ingine.connect.scripts import run_script
from ingine.contract.calls import upkeep
from ingine.contract.calls.running import Append, Finish, Refusal
from ingine.contract.entries import Entry
from ingine.contract.events import TerminalEvent, TokensEvent
from ingine.contract.jobs import Job, encode_job, read_job_id
from ingine.contract.keys import GROUP, Priority
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode
from ingine.producer import AsyncClient
from ingine.worker.last_ids import LAST_MS, MAX_PUT_BACK
from ingine.worker.queue import Queue
from tests.waiting import HANGS_S, wait_until_async
from tests.worker.test_worker import ENDLESS, GREEDY

GREATEST_ID = f"{LAST_MS}-{LAST_MS}"


@pytest.fixture
async def client(redis_url):
    """A real server: what its streams do at their end is what matters here."""
    async with redis.asyncio.from_url(redis_url, protocol=2) as client:
        yield client


async def holders(client, keys) -> list[tuple]:
    found = await client.xpending_range(keys.jobs("normal"), GROUP, "-", "+", 10)
    return [(each["message_id"], each["consumer"], each["times_delivered"]) for each in found]


async def adopt_all(queue: Queue) -> None:
    """Adopt entries as a worker does, repeatedly while there are some."""
    while (await queue.adopt())[0]:
        pass


@pytest.mark.parametrize("is_deleted", [False, True])
@pytest.mark.parametrize("is_delivered", [False, True])
async def test_the_stream_takes_jobs_again_and_none_is_lost(
    client, keys, make_queue, push, is_deleted, is_delivered
):
    queue, other, stream = make_queue("w1"), make_queue("w2"), keys.jobs("normal")
    for job_id in ("runs", "taken", "waits"):
        await push(Job(id=job_id, prompt="x"))
    runs, _ = await queue.take(2)
    begun = await queue.begin(runs, "runs", None)
    before, entries = await holders(client, keys), await client.xrange(stream)
    await client.xadd(stream, {"job": b"\xc1"}, id=GREATEST_ID)
    if is_delivered:
        await client.xreadgroup(GROUP, "waiting", {stream: ">"})
    if is_deleted:
        await client.xdel(stream, GREATEST_ID)
    with pytest.raises(ResponseError, match="exhausted"):
        await push(Job(id="new", prompt="x"))

    await adopt_all(queue)
    assert (await client.xrange(stream))[:3] == entries
    assert await holders(client, keys) == before
    assert not await client.exists(keys.dead, keys.while_renumbered("normal"), keys.set_aside("normal"))
    new = await push(Job(id="new", prompt="x"))
    taken = [entry.id for entry in await other.take(5) if entry.raw != b"\xc1"]
    assert taken == [entries[2][0].decode(), new]
    assert await queue.release(runs, "runs", begun.attempt)
    assert [entry.id for entry in await other.claim_idle(3600, 5)] == [runs.id]


async def test_a_stream_that_has_ids_left_is_left_alone(client, keys, make_queue, push):
    queue = make_queue("w1")
    await push(Job(id="a", prompt="x"))
    await client.xadd(keys.jobs("normal"), {"job": b"\xc1"}, id=f"{LAST_MS - 1}-0")
    await queue.adopt()
    assert await client.xlen(keys.jobs("normal")) == 2
    assert not await client.exists(keys.dead)


async def test_ids_of_the_last_millisecond_are_taken_back_before_they_are_used_up(
    client, keys, make_queue, push
):
    """Each new job would get one of these, and would be lost with them."""
    queue = make_queue("w1")
    await push(Job(id="a", prompt="x"))
    await client.xadd(keys.jobs("normal"), {"job": b"\xc1"}, id=f"{LAST_MS}-0")
    await adopt_all(queue)
    new = await push(Job(id="b", prompt="x"))
    assert not new.startswith(str(LAST_MS))
    assert await client.xlen(keys.jobs("normal")) == 3


async def test_what_waits_under_such_an_id_is_kept(client, keys, make_queue, push, redis_url):
    """The server assigned the id, since a client had used one of that millisecond before."""
    queue = make_queue("w1")
    await client.xadd(keys.jobs("normal"), {"job": b"\xc1"}, id=f"{LAST_MS}-0")
    async with AsyncClient(redis_url, queue=keys.queue) as producer:
        await producer.submit("x", job_id="a", tenant="gold")
        await push(Job(id="bare", prompt="x"))
        before = (await producer.status("a")).entry
        assert before == f"{LAST_MS}-1"
        await adopt_all(queue)
        junk, first, second = sorted(await queue.take(3), key=lambda entry: len(entry.raw))
        assert junk.raw == b"\xc1", "it waits too, to be buried as any other"
        assert {first.id, second.id} >= {(await producer.status("a")).entry}
        for entry, job_id in ((first, "bare"), (second, "a")):
            assert read_job_id(entry.raw) == job_id and entry.accepted is (job_id == "a")
            assert (await queue.begin(entry, job_id, None)).verdict == "run"
    assert not await client.exists(keys.dead, keys.set_aside("normal"))


async def test_what_a_worker_has_and_has_not_begun_waits_anew(client, keys, make_queue, redis_url):
    queue, other = make_queue("w1"), make_queue("w2")
    await lead_to_the_last_ids(client, keys)
    async with AsyncClient(redis_url, queue=keys.queue) as producer:
        await producer.submit("x", job_id="a")
        (old,) = await queue.take(1)
        await adopt_all(queue)
        (new,) = await other.take(1)
        assert (await queue.begin(old, "a", None)).verdict == "stale"
        assert (await other.begin(new, "a", None)).verdict == "run"


async def lead_to_the_last_ids(client, keys) -> None:
    await client.xadd(keys.jobs("normal"), {"job": b"\xc1"}, id=f"{LAST_MS}-0")
    await client.xdel(keys.jobs("normal"), f"{LAST_MS}-0")


async def test_what_runs_under_such_an_id_goes_on_from_its_log(client, keys, make_queue, redis_url):
    """It is treated as released: the lease of an entry that is gone cannot be renewed."""
    queue, other = make_queue("w1"), make_queue("w2")
    await lead_to_the_last_ids(client, keys)
    async with AsyncClient(redis_url, queue=keys.queue) as producer:
        await producer.submit("x", job_id="a")
        (old,) = await queue.take(1)
        first = await queue.begin(old, "a", None)
        tokens = [TokensEvent(number, [65], "A") for number in (1, 2)]
        assert await queue.append([Append("a", first.attempt, tokens[0], False)]) == [1]
        await adopt_all(other)
        assert await client.hmget(keys.job("a"), "status", "worker") == [b"queued", b""]
        assert await queue.append([Append("a", first.attempt, tokens[1], False)]) == [Refusal.STALE]
        assert not await queue.release(old, "a", first.attempt)
        (new,) = await other.take(1)
        again = await other.begin(new, "a", None)
        assert (again.verdict, again.position, again.deaths) == ("run", 1, 0)
        event = TerminalEvent(1, JobStatus.FINISHED, "a", finish_reason="stop")
        assert await other.finish(Finish(new, again.attempt, event, None)) == 1
        assert (await producer.attach("a").result()).finish_reason == "stop"
    assert not await client.exists(keys.dead)
    assert await client.xlen(keys.jobs("normal")) == 0


@pytest.mark.parametrize("how", ["cancelled", "finished"])
async def test_what_has_ended_meanwhile_is_not_put_back(client, keys, make_queue, redis_url, how):
    queue = make_queue("w1")
    await lead_to_the_last_ids(client, keys)
    async with AsyncClient(redis_url, queue=keys.queue) as producer:
        await producer.submit("x", job_id="a")
        if how == "finished":
            (entry,) = await queue.take(1)
            begun = await queue.begin(entry, "a", None)
        await set_aside(queue)
        if how == "finished":
            event = TerminalEvent(0, JobStatus.FINISHED, "a", finish_reason="stop")
            assert await queue.finish(Finish(entry, begun.attempt, event, None)) == 0
        else:
            assert await producer.cancel("a") == "cancelled"
        await adopt_all(queue)
        assert (await producer.status("a")).status == how
    assert not await client.exists(keys.set_aside("normal"))
    assert await client.xlen(keys.jobs("normal")) == 0


async def set_aside(queue: Queue) -> list[Entry]:
    """The first half alone, as of a worker that dies behind it."""
    call = upkeep.renumber(queue.keys, Priority.NORMAL, count=8)
    return (await run_script(queue._redis, call)).set_aside


async def test_ids_that_are_given_out_again_are_no_confusion(client, keys, make_queue, redis_url):
    """Two entries that were set aside one after the other, both under the same id."""
    queue = make_queue("w1")
    async with AsyncClient(redis_url, queue=keys.queue) as producer:
        for job_id in ("a", "b"):
            await lead_to_the_last_ids(client, keys)
            await producer.submit("x", job_id=job_id)
            assert (await producer.status(job_id)).entry == f"{LAST_MS}-1"
            await set_aside(queue)
        await adopt_all(queue)
        for entry in await queue.take(2):
            job_id = read_job_id(entry.raw)
            assert (await producer.status(job_id)).entry == entry.id
            assert (await queue.begin(entry, job_id, None)).verdict == "run"
        assert {(await producer.status(job_id)).status for job_id in ("a", "b")} == {"running"}


async def test_whoever_comes_second_puts_nothing_back_again(client, keys, make_queue, push):
    queue, other = make_queue("w1"), make_queue("w2")
    await lead_to_the_last_ids(client, keys)
    await push(Job(id="a", prompt="x"))
    (entry,) = await set_aside(queue)
    await adopt_all(other)
    call = upkeep.put_back(keys, Priority.NORMAL, aside_id=entry.id, job_id="a")
    assert await run_script(client, call) == 0
    assert await client.xlen(keys.jobs("normal")) == 1


async def test_what_is_no_stream_where_they_are_set_aside_goes(client, keys, make_queue, push):
    queue = make_queue("w1")
    await lead_to_the_last_ids(client, keys)
    await push(Job(id="a", prompt="x"))
    await client.set(keys.set_aside("normal"), "x")
    await adopt_all(queue)
    assert [read_job_id(entry.raw) for entry in await queue.take(2)] == ["a"]


async def test_more_of_them_than_are_put_back_at_once(client, keys, make_queue, push):
    queue = make_queue("w1")
    num_jobs = 2 * MAX_PUT_BACK
    for number in range(num_jobs):
        job = encode_job(Job(id=f"a-{number}", prompt="x"))
        sequence = LAST_MS - num_jobs + 1 + number
        await client.xadd(keys.jobs("normal"), {"job": job}, id=f"{LAST_MS}-{sequence}")
    assert await queue.adopt() == (MAX_PUT_BACK, False), "and the worker comes again at once"
    await adopt_all(queue)
    assert await client.xlen(keys.jobs("normal")) == num_jobs
    assert not await client.exists(keys.dead, keys.set_aside("normal"))


async def test_a_producer_that_adds_fast_keeps_no_worker(client, keys, make_queue, push, monkeypatch):
    """One more job before each call of the worker's."""
    queue, num_added = make_queue("w1"), 0
    await lead_to_the_last_ids(client, keys)
    execute = queue._redis.execute_command

    async def add_first(*args, **options):
        nonlocal num_added
        num_added += 1
        job = encode_job(Job(id=f"a-{num_added}", prompt="x"))
        await execute("XADD", keys.jobs("normal"), "*", "job", job)
        return await execute(*args, **options)

    monkeypatch.setattr(queue._redis, "execute_command", add_first)
    async with asyncio.timeout(HANGS_S):
        await queue.adopt()
    monkeypatch.undo()
    await adopt_all(queue)
    assert {read_job_id(entry.raw) for entry in await queue.take(num_added)} == {
        f"a-{number + 1}" for number in range(num_added)
    }


@pytest.mark.parametrize("ms", [LAST_MS - 1, LAST_MS - 2])
async def test_no_id_leads_to_the_last_ones_a_second_time(client, keys, make_queue, push, ms):
    """The last id of a millisecond, behind which `XADD *` goes on with the next one."""
    queue, stream = make_queue("w1"), keys.jobs("normal")
    await client.xadd(stream, {"job": b"\xc1"}, id=f"{ms}-{LAST_MS}")
    for _ in range(3):
        await push(Job(id="a", prompt="x"))
    await adopt_all(queue)
    for _ in range(3):
        assert not (await push(Job(id="a", prompt="x"))).startswith(str(LAST_MS))
    await client.xadd(stream, {"job": b"\xc1"}, id=f"{LAST_MS}-0")
    await adopt_all(queue)
    assert not (await push(Job(id="a", prompt="x"))).startswith(str(LAST_MS))


async def test_what_was_read_from_the_future_keeps_nothing_new_from_being_read(
    client, keys, make_queue, push
):
    """The entry that was read last is gone, and with it its id: what is added now has a lesser one."""
    queue, stream = make_queue("w1"), keys.jobs("normal")
    await client.xadd(stream, {"job": b"\xc1"}, id=f"{LAST_MS - 5}-0")
    (entry,) = await queue.take(1)
    await client.xack(stream, GROUP, entry.id)
    await client.xdel(stream, entry.id)
    await lead_to_the_last_ids(client, keys)
    await adopt_all(queue)
    new = await push(Job(id="a", prompt="x"))
    assert [entry.id for entry in await queue.take(2)] == [new]


async def test_producers_can_go_on_beside_a_worker(harness, redis_url):
    worker = await harness()
    stream = worker.keys.jobs("normal")
    await worker.push(Job(id="runs", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("runs"), what="tokens")
    await worker.redis.xadd(stream, {"job": b"\xc1"}, id=GREATEST_ID)
    worker.worker._partitions[0].intake._next_adoption = 0.0  # or in ten seconds

    async def submitted() -> bool:
        try:
            return bool(await worker.push(Job(id="later", prompt="x", sampling=GREEDY)))
        except ResponseError:
            return False

    await wait_until_async(submitted, what="ids")
    for job_id in ("runs", "later"):
        assert (await worker.end(job_id)).status is JobStatus.FINISHED
    (letter,) = await worker.dead_letters()
    assert letter[b"code"].decode() in (ErrorCode.BAD_RECORD, ErrorCode.NOT_MSGPACK)
