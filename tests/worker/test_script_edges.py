"""Scripts with numbers from outside, with time, and with data that could grow for ever."""

import pytest

from ingine.contract.calls.running import Append, Finish, Refusal
from ingine.contract.events import TerminalEvent, TokensEvent, decode_event
from ingine.contract.jobs import Job, decode_job, encode_job
from ingine.contract.keys import GROUP
from ingine.contract.record import JobStatus
from ingine.errors import ClientError
from ingine.producer import AsyncClient
from ingine.worker.queue import LONGEST_PAUSE_S, Queue
from tests.worker.conftest import take

JOB = Job(id="job-1", prompt="Hello", reply_to="batch")


async def end(queue: Queue, push, job_id: str, **options) -> None:
    """A job from its submission to its reply."""
    await push(Job(id=job_id, prompt="x"))
    begun = await queue.begin(entry := await take(queue), job_id, "batch")
    event = TerminalEvent(0, JobStatus.FINISHED, job_id)
    assert await queue.finish(Finish(entry, begun.attempt, event, "batch", **options)) == 0


async def replies(client, keys) -> list[str]:
    return [decode_event(f[b"event"]).job_id for _, f in await client.xrange(keys.replies("batch"))]


# --------------------------------------------------------------------------------------- replies


async def age(client, keys, by_ms: int) -> None:
    """Age the replies stream, as if its entries had been written so long ago."""
    stream = keys.replies("batch")
    entries = await client.xrange(stream)
    await client.delete(stream)
    for entry_id, fields in entries:
        fields[b"expires_at"] = int(fields[b"expires_at"]) - by_ms
        await client.xadd(stream, fields, id=entry_id)


async def test_a_replies_stream_under_steady_traffic_has_only_what_has_a_result(
    client, keys, make_queue, push
):
    queue = make_queue("w1")
    for number in range(5):
        await end(queue, push, f"old-{number}")
    await age(client, keys, 60_001)
    for number in range(3):
        await end(queue, push, f"new-{number}")
    assert await replies(client, keys) == ["new-0", "new-1", "new-2"]


async def test_a_reply_stays_as_long_as_its_own_result(client, keys, make_queue, push):
    """Workers, and clients that cancel, may have other TTLs: 59 s ago one of an hour, and one of a minute."""
    patient = make_queue("w1", result_ttl_s=3600)
    await end(patient, push, "long")
    for number in range(2):
        await end(make_queue("w1"), push, f"short-{number}")
    await age(client, keys, 61_000)
    await client.pexpire(keys.replies("batch"), 3539_000)
    await end(make_queue("w1"), push, "last")
    assert "long" in await replies(client, keys)
    assert await client.pttl(keys.replies("batch")) > 3500_000


async def test_foreign_and_older_replies_do_not_stay_for_ever(client, keys, make_queue, push):
    """Their ids may lie in the future, which all later ones inherit."""
    now_s, _ = await client.time()
    for entry_id in ("1-1", f"{(now_s - 10) * 1000}-0", f"{10**16}-0"):
        await client.xadd(keys.replies("batch"), {"event": b"x"}, id=entry_id)
    await end(make_queue("w1"), push, "a")
    assert await client.xlen(keys.replies("batch")) == 3, "without a field, an id says for how long"
    await client.delete(keys.replies("batch"))
    await client.xadd(keys.replies("batch"), {"event": b"x", "expires_at": 1}, id=f"{10**16}-0")
    await end(make_queue("w1"), push, "b")
    assert await replies(client, keys) == ["b"]


async def test_cancelling_never_shortens_the_life_of_other_replies(client, keys, make_queue, push):
    async with AsyncClient(queue=keys.queue, redis=client) as producer:
        await client.xadd(keys.replies("batch"), {"event": b"x"})
        await client.expire(keys.replies("batch"), 86_400)
        handle = await producer.submit("x", reply_to="batch")
        assert await handle.cancel() == "cancelled"
    assert await client.ttl(keys.replies("batch")) > 80_000


# ------------------------------------------------------------------------------------------ time


async def idle_ms(client, keys) -> int:
    (pending,) = await client.xpending_range(keys.jobs("normal"), GROUP, "-", "+", 1)
    return pending["time_since_delivered"]


async def test_a_lease_begins_with_the_attempt(client, keys, make_queue, push):
    """Jobs that are taken together may wait long, here for the prompts of others."""
    queue = make_queue("w1")
    await push(JOB)
    entry = await take(queue)
    await client.xclaim(keys.jobs("normal"), GROUP, "w1", 0, [entry.id], idle=10**7, justid=True)
    assert (await queue.begin(entry, JOB.id, None)).verdict == "run"
    assert await idle_ms(client, keys) < 10**6


@pytest.mark.parametrize("entry_id", ["1-1", "1577836799999-0", f"{10**15}-0", f"{10**18}-0"])
async def test_an_entry_whose_id_is_no_time_of_the_past_was_submitted_now(client, keys, make_queue, entry_id):
    queue = make_queue("w1")
    await client.xadd(keys.jobs("normal"), {"job": encode_job(JOB)}, id=entry_id)
    begun = await queue.begin(await take(queue), JOB.id, None)
    assert begun.submitted_at == begun.now == int(await client.hget(keys.job(JOB.id), "submitted_at"))


async def test_an_entry_of_the_past_was_submitted_when_its_id_says(client, keys, make_queue):
    queue = make_queue("w1")
    await client.xadd(keys.jobs("normal"), {"job": encode_job(JOB)}, id="1600000000000-0")
    assert (await queue.begin(await take(queue), JOB.id, None)).submitted_at == 1600000000000


@pytest.mark.parametrize("nonsense", ["", "x", "nan", "inf", "-5", "1e300", str(10**17), "9" * 400])
async def test_times_and_deaths_of_a_record_are_checked(client, keys, make_queue, push, nonsense):
    queue = make_queue("w1")
    await push(JOB)
    await queue.begin(entry := await take(queue), JOB.id, None)
    fields = dict.fromkeys(("submitted_at", "first_token_at", "deaths"), nonsense)
    await client.hset(keys.job(JOB.id), mapping=fields)
    begun = await queue.begin(entry, JOB.id, None)
    assert (begun.submitted_at, begun.first_token_at, begun.deaths) == (begun.now, 0, 0)
    await client.hset(keys.job(JOB.id), "deaths", nonsense)
    assert await queue.delay(entry, JOB.id, 2)
    now_s, _ = await client.time()
    assert await client.zscore(keys.delayed, JOB.id) <= (now_s + LONGEST_PAUSE_S + 60) * 1000


@pytest.mark.parametrize("nonsense", ["", "x", "-1", "1e3", "1.5", "9" * 16])
async def test_a_position_that_is_none_breaks_its_own_job_alone(client, keys, make_queue, push, nonsense):
    queue = make_queue("w1")
    await push(JOB)
    await queue.begin(entry := await take(queue), JOB.id, None)
    await client.hset(keys.job(JOB.id), "position", nonsense)
    tokens = Append(JOB.id, 1, TokensEvent(1, [7], "x"), publish=True)
    assert await queue.append([tokens]) == [Refusal.BROKEN]
    event = TerminalEvent(0, JobStatus.FINISHED, JOB.id)
    for call in (queue.finish(Finish(entry, 1, event, None)), queue.begin(entry, JOB.id, None)):
        with pytest.raises(Exception, match="not an integer"):
            await call


async def test_the_pause_after_a_death_has_an_end(client, keys, make_queue, push):
    queue = make_queue("w1")
    await push(JOB)
    await queue.begin(entry := await take(queue), JOB.id, None)
    await client.hset(keys.job(JOB.id), "deaths", 30)
    await queue.delay(entry, JOB.id, 1)
    now_s, _ = await client.time()
    due_ms = await client.zscore(keys.delayed, JOB.id)
    assert due_ms <= (now_s + 1 + LONGEST_PAUSE_S) * 1000


async def test_the_first_token_has_its_time_and_keeps_it(client, keys, make_queue, push):
    queue = make_queue("w1")
    await push(JOB)
    begun = await queue.begin(entry := await take(queue), JOB.id, None)
    assert begun.first_token_at == 0
    await queue.append([Append(JOB.id, 1, TokensEvent(1, [7], "x"), publish=True)])
    first_ms = int(await client.hget(keys.job(JOB.id), "first_token_at"))
    assert first_ms >= begun.now
    await client.hset(keys.job(JOB.id), "first_token_at", begun.now)
    await queue.append([Append(JOB.id, 1, TokensEvent(2, [8], "y"), publish=True)])
    assert (await queue.begin(entry, JOB.id, None)).first_token_at == begun.now


async def test_an_entry_of_a_job_that_has_ended_is_neither_there_nor_pending(client, keys, make_queue, push):
    queue, stream = make_queue("w1"), keys.jobs("normal")
    entry_id = await push(JOB)
    entry = await take(queue)
    await client.hset(keys.job(JOB.id), mapping={"status": "finished", "entry": entry_id, "position": 1})
    await client.xadd(keys.tokens(JOB.id), {"event": "x"}, id="1-1")
    assert (await queue.begin(entry, JOB.id, None)).verdict == "done"
    assert await client.xlen(stream) == 0
    assert (await client.xpending(stream, GROUP))["pending"] == 0


# ------------------------------------------------------------------------------------ fair order


async def add(client, keys, name: str, tenant: str, cost: object) -> None:
    fields = {"job": encode_job(Job(id=name, prompt="x")), "tenant": tenant, "cost": cost}
    await client.xadd(keys.jobs("normal"), fields)


async def order(queue: Queue, count: int) -> list[str]:
    return [decode_job(entry.raw).id for entry in await queue.take(count)]


async def test_no_job_costs_more_than_the_longest_one_that_the_engine_takes(client, keys, make_queue):
    queue = make_queue("w1", max_cost=100)
    await add(client, keys, "greedy-0", "greedy", 10**9)
    await add(client, keys, "greedy-1", "greedy", 1)
    for number in range(12):
        await add(client, keys, f"modest-{number}", "modest", 10)
    names = await order(queue, 14)
    assert names.index("greedy-1") in (11, 12), "behind 100 tokens of the other, not 10^9"


@pytest.mark.parametrize("nonsense", ["nan", "-nan", "inf", "-inf", "-5", "x", "", "1e999"])
async def test_a_cost_that_is_none_is_guessed_from_the_bytes(client, keys, make_queue, nonsense):
    queue = make_queue("w1")
    size = len(encode_job(Job(id="a-0", prompt="x")))
    await add(client, keys, "a-0", "a", nonsense)
    await add(client, keys, "b-0", "b", 1)
    await order(queue, 1)
    assert await client.zscore(keys.ends("normal"), "tenant:a") == pytest.approx(size / 4)


@pytest.mark.parametrize("nonsense", ["nan", "inf", "-3", "0", "x", ""])
async def test_a_weight_that_is_none_is_1(client, keys, make_queue, nonsense):
    await client.hset(keys.settings, "weight:a", nonsense)
    await add(client, keys, "a-0", "a", 40)
    await add(client, keys, "b-0", "b", 1)
    await order(make_queue("w1"), 1)
    assert await client.zscore(keys.ends("normal"), "tenant:a") == 40


async def test_tenants_of_the_past_are_forgotten_while_a_backlog_lasts(client, keys, make_queue):
    """A service with a tenant for each of its users, and never an empty queue."""
    queue = make_queue("w1")
    for number in range(20):
        await add(client, keys, f"flood-{number}", "flood", 10)
    for number in range(100):
        await add(client, keys, f"one-{number}", f"user-{number}", 1)
        await order(queue, 1)
    assert await client.zcard(keys.fair("normal")) == 20
    await order(queue, 10)
    assert await client.zcard(keys.ends("normal")) <= 13, "`now`, `flood`, and those with an entry that waits"


async def test_what_is_no_entry_in_the_fair_order_costs_nobody_his_turn(client, keys, make_queue):
    queue = make_queue("w1")
    for name in "abc":
        await add(client, keys, name, "t", 5)
    assert await order(queue, 1) == ["a"]
    await client.zadd(keys.fair("normal"), {"nonsense": 0, "99-99": 1})
    assert await order(queue, 5) == ["b", "c"]


async def test_the_shares_of_an_older_version_do_no_harm(client, keys, make_queue):
    await client.hset(f"{keys.prefix}:shares:normal", mapping={"now": 5, "tenant:t": 7})
    await add(client, keys, "a", "t", 5)
    assert await order(make_queue("w1"), 1) == ["a"]


# ---------------------------------------------------------------------------------- dead letters


@pytest.mark.parametrize("way", ["bury", "finish"])
async def test_a_requeued_job_is_whose_it_was_and_costs_what_it_did(client, keys, make_queue, way):
    queue = make_queue("w1")
    await add(client, keys, "a", "gold", 77)
    entry = await take(queue)
    if way == "bury":
        await queue.bury(entry, "duplicate_id", "why")
    else:
        await queue.begin(entry, "a", None)
        event = TerminalEvent(0, JobStatus.FAILED, "a", error={"code": "worker_lost", "message": "why"})
        await queue.finish(Finish(entry, 1, event, None, bury=True))
        await client.delete(keys.job("a"), keys.tokens("a"))
    ((letter_id, letter),) = await client.xrange(keys.dead)
    assert (letter[b"job"], letter[b"code"], letter[b"reason"]) == (entry.raw, letter[b"code"], b"why")
    async with AsyncClient(queue=keys.queue, redis=client) as producer:
        await producer.requeue(letter_id.decode())
    ((_, fields),) = await client.xrange(keys.jobs("normal"))
    assert fields == {b"job": entry.raw, b"tenant": b"gold", b"cost": b"77"}
    assert (await take(queue)).accepted
    assert await client.xlen(keys.dead) == 0


async def test_a_letter_without_a_job_says_so(client, keys, make_queue):
    make_queue("w1")
    letter_id = await client.xadd(keys.dead, {"stream": keys.jobs("normal"), "code": "x"})
    async with AsyncClient(queue=keys.queue, redis=client) as producer:
        with pytest.raises(ClientError, match="no field `job`"):
            await producer.requeue(letter_id.decode())
    assert await client.xlen(keys.dead) == 1
