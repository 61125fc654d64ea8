"""The worker's scripts, one promise at a time."""

import pytest

from ingine.contract.calls.running import Append, Finish, Refusal
from ingine.contract.events import TerminalEvent, TokensEvent, decode_event
from ingine.contract.jobs import Job, decode_job, encode_job
from ingine.contract.keys import GROUP, WAITING, Priority
from ingine.contract.record import JobStatus
from ingine.worker.queue import FIRST_PAUSE_S, LONGEST_PAUSE_S, SUSPECT_DEATHS
from tests.waiting import HANGS_S
from tests.worker.conftest import take

JOB = Job(id="job-1", prompt="Hello", reply_to="batch")


def append(position: int, token_ids: list[int], attempt: int = 1) -> Append:
    return Append(JOB.id, attempt, TokensEvent(position, token_ids, "x" * len(token_ids)), publish=True)


def finish(entry, position: int, attempt: int = 1, status: JobStatus = JobStatus.FINISHED) -> Finish:
    event = TerminalEvent(position=position, status=status, job_id=JOB.id, finish_reason="stop")
    return Finish(entry, attempt, event, JOB.reply_to)


async def log_of(client, keys, job_id: str = JOB.id) -> dict[str, object]:
    entries = await client.xrange(keys.tokens(job_id))
    return {entry_id.decode(): decode_event(fields[b"event"]) for entry_id, fields in entries}


async def test_a_job_from_xadd_to_its_terminal_event(client, keys, make_queue, push):
    worker = make_queue("w1")
    await push(JOB)
    entry = await take(worker)

    begun = await worker.begin(entry, JOB.id, JOB.reply_to)
    assert (begun.verdict, begun.attempt, begun.position, begun.deaths) == ("run", 1, 0, 0)
    assert begun.submitted_at == int(entry.id.split("-")[0]) <= begun.now

    assert await worker.append([append(1, [11])]) == [1]
    assert await worker.append([append(3, [12, 13])]) == [3]
    assert await worker.finish(finish(entry, 3)) == 3

    log = await log_of(client, keys)
    assert list(log) == ["1-0", "3-0", "3-1"]
    assert [t for event in list(log.values())[:2] for t in event.token_ids] == [11, 12, 13]
    assert log["3-1"].status is JobStatus.FINISHED

    # Nothing is left behind but what has a TTL: no entry, nothing pending.
    assert await client.xlen(keys.jobs("normal")) == 0
    assert (await client.xpending(keys.jobs("normal"), "workers"))["pending"] == 0
    for key in (keys.job(JOB.id), keys.tokens(JOB.id), keys.replies("batch")):
        assert 0 < await client.pttl(key) <= 60_000
    ((_, reply),) = await client.xrange(keys.replies("batch"))
    assert decode_event(reply[b"event"]) == log["3-1"]


async def test_events_are_published_as_they_are_logged(client, keys, make_queue, push):
    worker = make_queue("w1")
    await push(JOB)
    entry = await take(worker)
    await worker.begin(entry, JOB.id, None)
    async with client.pubsub() as pubsub:
        await pubsub.ssubscribe(keys.channel(JOB.id))
        await pubsub.get_message(timeout=HANGS_S)
        await worker.append([append(1, [11])])
        await worker.finish(finish(entry, 1))
        live = [
            decode_event((await pubsub.get_message(ignore_subscribe_messages=True, timeout=HANGS_S))["data"])
            for _ in range(2)
        ]
    assert live == list((await log_of(client, keys)).values())


async def test_an_append_whose_reply_was_lost_is_made_again_without_a_repeat(client, keys, make_queue, push):
    worker = make_queue("w1")
    await push(JOB)
    await worker.begin(await take(worker), JOB.id, None)
    assert await worker.append([append(2, [11, 12])]) == [2]
    assert await worker.append([append(2, [11, 12])]) == [2]
    assert list(await log_of(client, keys)) == ["2-0"]


async def test_a_gap_is_refused_with_the_position_to_go_on_from(client, keys, make_queue, push):
    worker = make_queue("w1")
    await push(JOB)
    await worker.begin(await take(worker), JOB.id, None)
    await worker.append([append(1, [11])])
    assert await worker.append([append(3, [13])]) == [1]
    assert list(await log_of(client, keys)) == ["1-0"]


async def test_one_append_answers_each_request_by_itself(client, keys, make_queue, push):
    worker = make_queue("w1")
    for name in ("a", "b", "c"):
        await push(Job(id=name, prompt="x"))
    for entry, name in zip(await worker.take(3), ("a", "b", "c"), strict=True):
        await worker.begin(entry, name, None)
    await client.hset(keys.job("b"), "cancel", 1)
    event = TokensEvent(1, [7], "x")
    appends = [
        Append(name, attempt, event, publish=False) for name, attempt in (("a", 1), ("b", 1), ("c", 9))
    ]
    assert await worker.append(appends) == [1, Refusal.CANCELLED, Refusal.STALE]
    assert [list(await log_of(client, keys, name)) for name in ("a", "b", "c")] == [["1-0"], [], []]


async def test_a_zombie_is_fenced_from_every_write(client, keys, make_queue, push):
    zombie, heir = make_queue("zombie"), make_queue("heir")
    await push(JOB)
    entry = await take(zombie)
    await zombie.begin(entry, JOB.id, None)
    await zombie.append([append(1, [11])])

    (claimed,) = await heir.claim_idle(0, 10)
    begun = await heir.begin(claimed, JOB.id, None)
    assert (begun.attempt, begun.position, begun.deaths) == (2, 1, 1)
    assert await heir.committed(JOB.id) == [11]

    assert await zombie.append([append(2, [12])]) == [Refusal.STALE]
    assert await zombie.finish(finish(entry, 1)) == Refusal.STALE
    assert await zombie.release(entry, JOB.id, 1) is False
    assert (await zombie.begin(entry, JOB.id, None)).verdict == "stale"
    assert await zombie.bury(entry, "x", "y") is False

    assert await heir.append([append(2, [12], attempt=2)]) == [2]
    assert await heir.finish(finish(claimed, 2, attempt=2)) == 2
    assert list(await log_of(client, keys)) == ["1-0", "2-0", "2-1"]


async def test_an_attempt_number_given_out_twice_fences_all_the_same(client, keys, make_queue, push):
    """A server that lost its last second, and with it the first begin, assigns a number twice."""
    first, second = make_queue("first"), make_queue("second")
    await push(JOB)
    entry = await take(first)
    assert (await first.begin(entry, JOB.id, None)).attempt == 1
    await client.delete(keys.job(JOB.id))
    (claimed,) = await second.claim_idle(0, 1)
    assert (await second.begin(claimed, JOB.id, None)).attempt == 1

    assert await first.append([append(1, [98])]) == [Refusal.STALE]
    assert await first.finish(finish(entry, 0)) == Refusal.STALE
    assert await first.delay(entry, JOB.id, 1) is False
    assert await second.append([append(1, [11])]) == [1]
    assert (await log_of(client, keys))["1-0"].token_ids == [11]


async def test_only_whoever_has_begun_a_job_hands_it_over(client, keys, make_queue, push):
    """This holds even if the entry is its own again, and the attempt's number was assigned twice."""
    first, second = make_queue("first"), make_queue("second")
    await push(JOB)
    entry = await take(first)
    await first.begin(entry, JOB.id, None)
    await client.delete(keys.job(JOB.id))
    (claimed,) = await second.claim_idle(0, 1)
    assert (await second.begin(claimed, JOB.id, None)).attempt == 1
    await first.claim_idle(0, 1)
    assert await first.release(entry, JOB.id, 1) is False
    assert await client.hmget(keys.job(JOB.id), "status", "worker") == [b"running", b"second"]


@pytest.mark.parametrize("leave", ["release", "delay"])
async def test_an_attempt_that_is_over_cannot_take_the_next_one_with_it(
    client, keys, make_queue, push, leave
):
    worker = make_queue("w1")
    await push(JOB)
    entry = await take(worker)
    await worker.begin(entry, JOB.id, None)
    assert (await worker.begin(entry, JOB.id, None)).attempt == 2
    assert await getattr(worker, leave)(entry, JOB.id, 1) is False
    assert await client.hmget(keys.job(JOB.id), "status", "worker") == [b"running", b"w1"]
    assert await getattr(worker, leave)(entry, JOB.id, 2) is True


@pytest.mark.parametrize("cancel", ["true", "", "0", "yes"])
async def test_only_a_1_cancels(client, keys, make_queue, push, cancel):
    worker = make_queue("w1")
    await push(JOB)
    entry = await take(worker)
    await worker.begin(entry, JOB.id, None)
    await client.hset(keys.job(JOB.id), "cancel", cancel)
    assert await worker.append([append(1, [11])]) == [1]
    (again,), _ = await worker.own_pending()
    begun = await worker.begin(again, JOB.id, None)
    assert (begun.cancelled, begun.attempt) == (False, 2)


async def test_finish_is_exactly_once(client, keys, make_queue, push):
    worker = make_queue("w1")
    await push(JOB)
    entry = await take(worker)
    await worker.begin(entry, JOB.id, None)
    await worker.append([append(1, [11])])
    assert await worker.finish(finish(entry, 2)) == 1, "the log ends at 1, not at 2"
    assert await worker.finish(finish(entry, 1)) == 1
    assert await worker.finish(finish(entry, 1)) == 1, "the reply was lost: the same answer"
    assert await worker.finish(finish(entry, 1, status=JobStatus.FAILED)) == Refusal.STALE
    assert list(await log_of(client, keys)) == ["1-0", "1-1"]
    assert await client.xlen(keys.replies("batch")) == 1


async def test_a_released_job_is_claimed_at_once_and_keeps_its_place(client, keys, make_queue, push):
    leaving, staying = make_queue("leaving"), make_queue("staying")
    await push(JOB)
    entry = await take(leaving)
    await leaving.begin(entry, JOB.id, None)
    await leaving.append([append(1, [11])])
    await push(Job(id="later", prompt="x"))

    assert await staying.claim_idle(3600, 10) == [], "a live lease is left alone"
    assert await leaving.release(entry, JOB.id, 1) is True
    assert await leaving.release(entry, JOB.id, 1) is False

    (claimed,) = await staying.claim_idle(3600, 10)
    assert claimed == entry
    begun = await staying.begin(claimed, JOB.id, None)
    assert (begun.attempt, begun.position, begun.deaths) == (2, 1, 0), "a hand-over is no death"


async def test_an_entry_that_was_never_begun_can_be_released(make_queue, push):
    leaving, staying = make_queue("leaving"), make_queue("staying")
    await push(JOB)
    entry = await take(leaving)
    assert await leaving.release_unbegun(entry, None) is True
    assert await staying.claim_idle(3600, 10) == [entry]


async def test_a_begin_whose_reply_was_lost_counts_no_death(make_queue, push):
    worker = make_queue("w1")
    await push(JOB)
    entry = await take(worker)
    await worker.begin(entry, JOB.id, None)
    (again,), _ = await worker.own_pending()
    begun = await worker.begin(again, JOB.id, None)
    assert (begun.attempt, begun.deaths) == (2, 0)


async def test_a_failed_step_counts_as_a_death_and_pauses_for_longer_each_time(
    client, keys, make_queue, push
):
    worker = make_queue("w1")
    await push(JOB)
    for deaths in range(3):
        entry = await take(worker)
        assert (await worker.begin(entry, JOB.id, None)).deaths == deaths
        before_s, _ = await client.time()
        assert await worker.delay(entry, JOB.id, deaths + 1)
        after_s, _ = await client.time()
        assert await client.hget(keys.job(JOB.id), "status") == b"delayed"
        due_ms = await client.zscore(keys.delayed, JOB.id)
        pause_s = FIRST_PAUSE_S * 2**deaths
        assert (before_s + pause_s) * 1000 <= due_ms <= (after_s + 1 + pause_s) * 1000
        await worker.promote()
        assert await worker.take(1) == []
        await client.zadd(keys.delayed, {JOB.id: 1})
        await worker.promote()
    assert not await client.exists(keys.delayed)
    assert await client.xlen(keys.jobs("normal")) == 1


async def test_no_pause_is_longer_than_the_longest(client, keys, make_queue, push):
    worker = make_queue("w1")
    await push(JOB)
    entry = await take(worker)
    await worker.begin(entry, JOB.id, None)
    await client.hset(keys.job(JOB.id), "deaths", 40)
    assert await worker.delay(entry, JOB.id, 1)
    after_s, _ = await client.time()
    assert await client.zscore(keys.delayed, JOB.id) <= (after_s + 1 + LONGEST_PAUSE_S) * 1000


async def test_a_second_entry_with_the_same_id_is_a_duplicate_and_can_be_buried(
    client, keys, make_queue, push
):
    worker = make_queue("w1")
    await push(JOB)
    first = await take(worker)
    await worker.begin(first, JOB.id, None)
    await push(JOB)
    second = await take(worker)
    assert (await worker.begin(second, JOB.id, None)).verdict == "duplicate"
    assert await worker.bury(second, "duplicate_id", "why") is True
    ((_, dead),) = await client.xrange(keys.dead)
    assert dead[b"code"] == b"duplicate_id" and dead[b"job"] == second.raw
    assert dead[b"stream"].decode() == keys.jobs("normal") and dead[b"deliveries"] == b"1"
    # The first one is not disturbed, not even when it has ended.
    assert await worker.finish(finish(first, 0)) == 0
    await push(JOB)
    assert (await worker.begin(await take(worker), JOB.id, None)).verdict == "duplicate"


async def test_an_entry_that_comes_back_after_its_job_has_ended_is_cleared_away(
    client, keys, make_queue, push
):
    """A failover may lose the XACK but keep the record."""
    worker = make_queue("w1")
    entry_id = await push(JOB)
    entry = await take(worker)
    await worker.begin(entry, JOB.id, None)
    await worker.finish(finish(entry, 0))
    await client.xgroup_setid(keys.jobs("normal"), "workers", "0")
    await client.execute_command("XADD", keys.jobs("high"), entry_id, "job", entry.raw)
    (again,) = await worker.take(1)
    assert (await worker.begin(again, JOB.id, None)).verdict == "done"
    assert await client.xlen(keys.jobs("high")) == 0
    assert list(await log_of(client, keys)) == ["0-1"]


async def test_urgent_jobs_come_first_and_low_ones_are_not_starved(make_queue, push):
    worker = make_queue("w1")
    await push(Job(id="low", prompt="x"), Priority.LOW)
    for number in range(20):
        await push(Job(id=f"high-{number}", prompt="x"), Priority.HIGH)
    order = [(await worker.take(1))[0].priority for _ in range(12)]
    assert order[0] is Priority.HIGH
    assert order.count(Priority.LOW) == 1


async def test_a_read_takes_no_more_than_it_was_asked_for(make_queue, push):
    worker = make_queue("w1")
    for priority in Priority:
        for number in range(3):
            await push(Job(id=f"{priority}-{number}", prompt="x"), priority)
    taken = await worker.take(4)
    assert [entry.priority for entry in taken] == ["high", "high", "high", "normal"]


async def test_claiming_keeps_its_cursor_past_live_leases(make_queue, push):
    """A wall of entries that are not idle must not hide the idle one behind them."""
    alive, dead, sweeper = make_queue("alive"), make_queue("dead"), make_queue("sweeper")
    for number in range(300):
        await push(Job(id=f"a{number}", prompt="x"))
    await alive.take(300)
    await push(Job(id="z", prompt="x"))
    entry = await take(dead)
    await dead.release_unbegun(entry, None)
    assert await sweeper.claim_idle(3600, 1) == [entry]


@pytest.mark.parametrize("client", ["real"], indirect=True)  # fakeredis words this error differently
async def test_a_server_that_was_emptied_gets_its_groups_again(client, keys, make_queue, push):
    worker = make_queue("w1")
    await client.delete(*keys.all_jobs)
    assert await worker.take(1) == []
    await push(JOB)
    assert (await take(worker)).raw


@pytest.mark.parametrize("field", ["prompt", "x"])
async def test_an_entry_without_a_job_field_is_delivered_empty(client, keys, make_queue, field):
    worker = make_queue("w1")
    await client.xadd(keys.jobs("normal"), {field: "hello"})
    entry = await take(worker)
    assert (entry.raw, entry.foreign) == (b"", ((field.encode(), b"hello"),))


async def test_an_entry_deleted_while_pending_is_passed_over(client, keys, make_queue, push):
    worker = make_queue("w1")
    await push(JOB)
    entry = await take(worker)
    await client.xdel(keys.jobs("normal"), entry.id)
    assert await worker.own_pending() == ([], {})


async def test_a_delayed_job_keeps_its_time_of_submission_and_its_log(client, keys, make_queue, push):
    worker = make_queue("w1")
    first = await push(JOB)
    entry = await take(worker)
    begun = await worker.begin(entry, JOB.id, None)
    await worker.append([append(1, [11])])
    await worker.delay(entry, JOB.id, 1)
    assert await worker.append([append(2, [12])]) == [Refusal.STALE]
    assert await worker.finish(finish(entry, 1)) == Refusal.STALE
    await client.zadd(keys.delayed, {JOB.id: 1})
    await worker.promote()
    again = await take(worker)
    assert again.id != first and again.raw == entry.raw
    resumed = await worker.begin(again, JOB.id, None)
    assert (resumed.position, resumed.submitted_at) == (1, begun.submitted_at)
    assert not await client.hexists(keys.job(JOB.id), "raw")


async def test_a_job_is_not_promoted_before_its_time(client, keys, make_queue, push):
    worker = make_queue("w1")
    await push(JOB)
    entry = await take(worker)
    await worker.begin(entry, JOB.id, None)
    await worker.delay(entry, JOB.id, 1, pause_s=3600)
    await worker.promote()
    assert await worker.take(1) == [] and await client.zcard(keys.delayed) == 1
    assert await client.hget(keys.job(JOB.id), "deaths") == b"0"


async def test_a_record_that_is_none_does_not_hold_up_those_that_are_due(client, keys, make_queue, push):
    worker = make_queue("w1")
    await push(JOB)
    entry = await take(worker)
    await worker.begin(entry, JOB.id, None)
    await worker.delay(entry, JOB.id, 1)
    await client.set(keys.job("foreign"), "x")
    await client.zadd(keys.delayed, {JOB.id: 3, "foreign": 1, "gone": 2})
    await worker.promote()
    assert (await take(worker)).raw == entry.raw
    assert not await client.exists(keys.delayed)


# ------------------------------------------------------------------------------------- fair order


async def submit(client, keys, name: str, *, tenant: str, cost: int) -> None:
    fields = {"job": encode_job(Job(id=name, prompt="x")), "tenant": tenant, "cost": cost}
    await client.xadd(keys.jobs("normal"), fields)


async def order(queue, count: int) -> list[str]:
    return [decode_job(entry.raw).id for entry in await queue.take(count)]


async def test_a_tenant_that_floods_does_not_starve_another(client, keys, make_queue):
    worker = make_queue("w1")
    for number in range(50):
        await submit(client, keys, f"flood-{number}", tenant="flood", cost=100)
    assert await order(worker, 5) == [f"flood-{number}" for number in range(5)]
    for number in range(3):
        await submit(client, keys, f"small-{number}", tenant="small", cost=100)
    taken = await order(worker, 6)
    assert {name for name in taken if name.startswith("small")} == {"small-0", "small-1", "small-2"}


async def test_shares_are_counted_in_tokens_and_weighted(client, keys, make_queue):
    await client.hset(keys.settings, "weight:gold", 3)
    for number in range(40):
        await submit(client, keys, f"gold-{number}", tenant="gold", cost=30)
        await submit(client, keys, f"long-{number}", tenant="long", cost=40)
        await submit(client, keys, f"short-{number}", tenant="short", cost=10)
    names = [name.partition("-")[0] for name in await order(make_queue("w1"), 45)]
    tokens = {"gold": 30 * names.count("gold"), "long": 40 * names.count("long")}
    tokens["short"] = 10 * names.count("short")
    assert tokens["gold"] == pytest.approx(3 * tokens["short"], rel=0.25)
    assert tokens["long"] == pytest.approx(tokens["short"], abs=40)


async def test_within_a_tenant_the_oldest_comes_first(client, keys, make_queue):
    for number, cost in enumerate((900, 1, 50, 7)):
        await submit(client, keys, f"job-{number}", tenant="a", cost=cost)
    assert await order(make_queue("w1"), 4) == [f"job-{number}" for number in range(4)]


async def test_nothing_of_the_fair_order_is_left_when_nothing_waits(client, keys, make_queue):
    worker = make_queue("w1")
    await submit(client, keys, "a", tenant="a", cost=5)
    await order(worker, 1)
    assert await order(worker, 1) == []
    assert not await client.exists(keys.fair("normal"), keys.ends("normal"))


async def test_a_fair_order_that_was_lost_is_made_again(client, keys, make_queue):
    worker = make_queue("w1")
    for name in "abc":
        await submit(client, keys, name, tenant=name, cost=5)
    assert await order(worker, 1) == ["a"]
    await client.delete(keys.fair("normal"), keys.ends("normal"))
    assert await order(worker, 5) == ["b", "c"]


async def test_a_cancelled_entry_leaves_no_hole_in_what_is_taken(client, keys, make_queue):
    worker = make_queue("w1")
    for name in "abcd":
        await submit(client, keys, name, tenant="t", cost=5)
    assert await order(worker, 1) == ["a"]
    (second, *_) = await client.xpending_range(keys.jobs("normal"), GROUP, "-", "+", 1, WAITING)
    await client.xack(keys.jobs("normal"), GROUP, second["message_id"])
    await client.xdel(keys.jobs("normal"), second["message_id"])
    assert await order(worker, 2) == ["c", "d"]


async def test_tenant_and_cost_may_be_missing_or_nonsense(client, keys, make_queue):
    worker = make_queue("w1")
    for number, cost in enumerate(("nan", "-5", "x", "1e999", "")):
        await submit(client, keys, f"job-{number}", tenant="t", cost=cost)
    await client.xadd(keys.jobs("normal"), {"foreign": b"x"})
    await submit(client, keys, "other", tenant="u", cost=1)
    assert len(await worker.take(10)) == 7


async def test_what_waits_is_never_swept(client, keys, make_queue):
    for name in "ab":
        await submit(client, keys, name, tenant="t", cost=5)
    await order(make_queue("w1"), 1)
    swept = await make_queue("w2").claim_idle(0, 10)
    assert [decode_job(entry.raw).id for entry in swept] == ["a"]
    assert await order(make_queue("w3"), 10) == ["b"]


# ---------------------------------------------------------------------------- suspects, dead letters


async def test_a_job_with_two_deaths_is_begun_by_a_worker_without_others_only(client, keys, make_queue, push):
    await push(JOB)
    for death in range(SUSPECT_DEATHS):
        worker = make_queue(f"w{death}")
        (entry,) = await worker.take(1) or await worker.claim_idle(0, 1)
        assert (await worker.begin(entry, JOB.id, None, alone=False)).deaths == death
    careful = make_queue("careful")
    (entry,) = await careful.claim_idle(0, 1)
    assert (await careful.begin(entry, JOB.id, None, alone=False)).verdict == "suspect"
    assert await client.hget(keys.job(JOB.id), "worker") == b"w1"
    begun = await careful.begin(entry, JOB.id, None, alone=True)
    assert (begun.verdict, begun.deaths) == ("run", SUSPECT_DEATHS)


async def test_a_job_that_runs_no_more_needs_no_worker_to_itself(make_queue, push):
    await push(JOB)
    for death in range(3):
        worker = make_queue(f"w{death}")
        (entry,) = await worker.take(1) or await worker.claim_idle(0, 1)
        await worker.begin(entry, JOB.id, None)
    last = make_queue("last")
    (entry,) = await last.claim_idle(0, 1)
    assert (await last.begin(entry, JOB.id, None, alone=False)).deaths == 3


async def test_a_buried_job_has_its_terminal_event_and_lies_in_the_dead_letters(
    client, keys, make_queue, push
):
    worker = make_queue("w1")
    await push(JOB)
    entry = await take(worker)
    await worker.begin(entry, JOB.id, None)
    error = {"code": "worker_lost", "message": "3 workers died"}
    event = TerminalEvent(position=0, status=JobStatus.FAILED, job_id=JOB.id, error=error)
    assert await worker.finish(Finish(entry, 1, event, None, bury=True)) == 0
    assert await worker.finish(Finish(entry, 1, event, None, bury=True)) == 0
    ((_, letter),) = await client.xrange(keys.dead)
    assert letter[b"job"] == entry.raw
    assert (letter[b"code"], letter[b"reason"]) == (b"worker_lost", b"3 workers died")
    assert (await log_of(client, keys))["0-1"].error == error


async def test_a_reply_never_shortens_the_life_of_others(client, keys, make_queue, push):
    worker = make_queue("w1")
    await push(JOB)
    entry = await take(worker)
    await worker.begin(entry, JOB.id, JOB.reply_to)
    await client.xadd(keys.replies("batch"), {"event": b"x"})
    await client.expire(keys.replies("batch"), 86_400)
    await worker.finish(finish(entry, 0))
    assert await client.ttl(keys.replies("batch")) > 80_000
