"""An entry with the greatest id that there is: behind it nobody can add another to the stream."""

import pytest
import redis.asyncio
from redis.exceptions import ResponseError

from ingine.errors import ClientError, ErrorCode
from ingine.keys import GROUP
from ingine.scripts import read_script
from ingine.wire import Job, JobStatus, TerminalEvent, encode_job
from producer import AsyncClient
from tests.waiting import wait_until_async
from tests.worker.test_worker import ENDLESS, GREEDY
from worker.entries import Finish
from worker.last_ids import GREATEST_ID, JOBS_PER_READ, LAST_MS


@pytest.fixture
async def client(redis_url):
    """A real server: what its streams do at their end is what matters here."""
    async with redis.asyncio.from_url(redis_url, protocol=2) as client:
        yield client


async def holders(client, keys) -> list[tuple]:
    found = await client.xpending_range(keys.jobs("normal"), GROUP, "-", "+", 10)
    return [(each["message_id"], each["consumer"], each["times_delivered"]) for each in found]


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

    await queue.adopt()
    assert await client.xrange(stream) == entries
    assert await holders(client, keys) == before
    assert await client.xlen(keys.dead) == (0 if is_deleted else 1)
    assert not await client.exists(keys.while_renumbered("normal"))
    new = await push(Job(id="new", prompt="x"))
    assert [entry.id for entry in await other.take(5)] == [entries[2][0].decode(), new]
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
    await queue.adopt()
    new = await push(Job(id="b", prompt="x"))
    assert not new.startswith(str(LAST_MS))
    assert await client.xlen(keys.jobs("normal")) == 2


async def test_what_the_dead_letters_refuse_keeps_no_other_stream_waiting(client, keys, make_queue, push):
    queue = make_queue("w1")
    await client.set(keys.dead, "x")
    await client.xadd(keys.jobs("high"), {"job": b"\xc1"}, id=GREATEST_ID)
    await client.xadd(keys.jobs("low"), {"job": b"\xc1"}, id="5-0")
    await client.xreadgroup(GROUP, "gone", {keys.jobs("low"): ">"})
    await client.xgroup_delconsumer(keys.jobs("low"), GROUP, "gone")
    with pytest.raises(ResponseError, match="WRONGTYPE"):
        await queue.adopt()
    pending = await client.xpending(keys.jobs("low"), GROUP)
    assert pending["pending"] == 1, "the entry that nobody had is adopted all the same"


async def test_what_waits_under_such_an_id_is_kept(client, keys, make_queue, push, redis_url):
    """By the server it was given: somebody had used one of that millisecond before."""
    queue = make_queue("w1")
    await client.xadd(keys.jobs("normal"), {"job": b"\xc1"}, id=f"{LAST_MS}-0")
    async with AsyncClient(redis_url, queue=keys.queue) as producer:
        await producer.submit("x", job_id="a", tenant="gold")
        await push(Job(id="bare", prompt="x"))
        before = (await producer.status("a")).entry
        assert before == f"{LAST_MS}-1"
        await queue.adopt()
        assert [letter.job_id for letter in await producer.dead_letters()] == [None]
        first, second = await queue.take(2)
        assert {first.id, second.id} >= {(await producer.status("a")).entry} and first.accepted
        assert (await queue.begin(first, "a", None)).verdict == "run"
        assert (await queue.begin(second, "bare", None)).verdict == "run"


async def test_what_came_after_the_look_can_be_requeued(client, keys, make_queue, redis_url):
    queue = make_queue("w1")
    await client.xadd(keys.jobs("normal"), {"job": b"\xc1"}, id=f"{LAST_MS}-{LAST_MS - 1}")
    async with AsyncClient(redis_url, queue=keys.queue) as producer:
        await producer.submit("x", job_id="a")
        touched = [keys.jobs("normal"), keys.while_renumbered("normal"), keys.dead]
        assert (
            await client.register_script(read_script("worker", "renumber"))(
                keys=touched, args=[GROUP, "w1", 0]
            )
            == 2
        )
        letters = await producer.dead_letters()
        assert {letter.job_id for letter in letters} == {"a", None}
        (letter,) = [letter for letter in letters if letter.job_id == "a"]
        entry_id = await producer.requeue(letter.entry_id)
        assert (await producer.status("a")).entry == entry_id
        (entry,) = await queue.take(1)
        assert (await queue.begin(entry, "a", None)).verdict == "run"
        with pytest.raises(ClientError, match="no dead letter"):
            await producer.requeue(letter.entry_id)


async def test_what_a_worker_has_and_has_not_begun_waits_anew(client, keys, make_queue, redis_url):
    queue, other = make_queue("w1"), make_queue("w2")
    await client.xadd(keys.jobs("normal"), {"job": b"\xc1"}, id=f"{LAST_MS}-0")
    await client.xdel(keys.jobs("normal"), f"{LAST_MS}-0")
    async with AsyncClient(redis_url, queue=keys.queue) as producer:
        await producer.submit("x", job_id="a")
        (old,) = await queue.take(1)
        await queue.adopt()
        (new,) = await other.take(1)
        assert (await queue.begin(old, "a", None)).verdict == "stale"
        assert (await other.begin(new, "a", None)).verdict == "run"


async def test_what_runs_under_such_an_id_ends_as_it_would(client, keys, make_queue, redis_url):
    queue = make_queue("w1")
    await client.xadd(keys.jobs("normal"), {"job": b"\xc1"}, id=f"{LAST_MS}-0")
    await client.xdel(keys.jobs("normal"), f"{LAST_MS}-0")
    async with AsyncClient(redis_url, queue=keys.queue) as producer:
        await producer.submit("x", job_id="a")
        (entry,) = await queue.take(1)
        begun = await queue.begin(entry, "a", None)
        await queue.adopt()
        assert await client.xlen(keys.jobs("normal")) == 0
        event = TerminalEvent(0, JobStatus.FINISHED, "a", finish_reason="stop")
        assert await queue.finish(Finish(entry, begun.attempt, event, None)) == 0
        assert (await producer.attach("a").result()).finish_reason == "stop"
        assert [letter.job_id for letter in await producer.dead_letters()] == ["a"]


async def test_more_of_them_than_are_read_at_once(client, keys, make_queue, push):
    queue = make_queue("w1")
    num_jobs = 2 * JOBS_PER_READ
    for number in range(num_jobs):
        job = encode_job(Job(id=f"a-{number}", prompt="x"))
        sequence = LAST_MS - num_jobs + 1 + number
        await client.xadd(keys.jobs("normal"), {"job": job}, id=f"{LAST_MS}-{sequence}")
    await queue.adopt()
    assert await client.xlen(keys.jobs("normal")) == num_jobs
    assert await client.xlen(keys.dead) == 0


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
