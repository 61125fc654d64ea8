"""Deadlines of jobs that nobody runs, whoever ends them."""

from unittest.mock import Mock

import pytest
import redis.asyncio

from ingine.connect.scripts import run_script
from ingine.contract import expiry
from ingine.contract.calls.running import Append, Finish, Refusal
from ingine.contract.events import TerminalEvent, TokensEvent, decode_event
from ingine.contract.expiry import MAX_EXPIRED, expire, expire_due
from ingine.contract.keys import GROUP, WAITING
from ingine.contract.record import JobStatus
from ingine.producer.submission import build_submission
from ingine.worker.queue import Queue
from tests.served_models import TINY
from tests.worker.conftest import take

TTL_S = 60


@pytest.fixture
def submit(client, keys):
    async def submit(job_id: str = "a", *, deadline_s: float | None = 0.001, **options) -> None:
        submission = build_submission("x", job_id=job_id, deadline_s=deadline_s, **options)
        assert (await run_script(client, submission.script_call(keys))).verdict == "accepted"

    return submit


@pytest.fixture
def let_deadline_pass(client, keys):
    async def let_deadline_pass(job_id: str = "a") -> None:
        await client.hset(keys.job(job_id), "deadline_at", 1)
        await client.zadd(keys.deadlines, {job_id: 1}, xx=True)

    return let_deadline_pass


async def expired(client, keys, job_id: str = "a") -> str:
    return (await expire(client, keys, [job_id], result_ttl_s=TTL_S))[job_id]


async def last_event(client, keys, job_id: str = "a") -> TerminalEvent:
    return decode_event((await client.xrevrange(keys.tokens(job_id), count=1))[0][1][b"event"])


async def assert_nothing_is_left(client, keys, job_id: str = "a") -> None:
    """Assert that only keys with a TTL are left."""
    for stream in keys.all_jobs:
        assert await client.xlen(stream) == 0
        assert (await client.xpending(stream, GROUP))["pending"] == 0
    assert not await client.exists(keys.delayed, keys.deadlines, keys.bytes)
    for key in (keys.job(job_id), keys.tokens(job_id)):
        assert 0 < await client.pttl(key) <= TTL_S * 1000


@pytest.mark.parametrize("not_before_s", [None, 3600])
async def test_a_job_that_waits_expires_without_a_worker(
    client, keys, make_queue, submit, let_deadline_pass, not_before_s
):
    options = {
        "not_before_s": not_before_s,
        "metadata": {"n": 1},
        "reply_to": "batch",
        "idempotency_key": "k",
    }
    await submit(deadline_s=7200, priority="low", **options)
    assert await client.zcard(keys.deadlines) == 1
    deadline_at = await client.zscore(keys.deadlines, "a")
    await client.zadd(keys.deadlines, {"a": 1})
    assert await expired(client, keys) == "early"
    assert await client.zscore(keys.deadlines, "a") == deadline_at
    await let_deadline_pass()
    await expire_due(client, keys, result_ttl_s=TTL_S)

    end = await last_event(client, keys)
    assert (end.status, end.position, end.metadata) == (JobStatus.EXPIRED, 0, {"n": 1})
    assert end.error["code"] == "deadline_exceeded"
    assert await client.hget(keys.job("a"), "status") == b"expired"
    assert not await client.hexists(keys.job("a"), "raw")
    await assert_nothing_is_left(client, keys)
    ((_, reply),) = await client.xrange(keys.replies("batch"))
    assert decode_event(reply[b"event"]) == end
    assert 0 < await client.pttl(keys.idem("k")) <= TTL_S * 1000


async def test_a_lost_reply_does_no_harm(client, keys, make_queue, submit, let_deadline_pass):
    await submit(reply_to="batch")
    await let_deadline_pass()
    assert [await expired(client, keys) for _ in range(2)] == ["expired", "expired"]
    assert await client.xlen(keys.replies("batch")) == await client.xlen(keys.tokens("a")) == 1
    assert await expired(client, keys, "nobody") == "unknown"


async def test_what_somebody_runs_is_left_to_him_and_looked_at_again(
    client, keys, make_queue, submit, let_deadline_pass
):
    worker = make_queue("w1")
    await submit()
    begun = await worker.begin(await take(worker), "a", None)
    await let_deadline_pass()
    assert await expired(client, keys) == "running"
    assert await client.zscore(keys.deadlines, "a") > begun.now, "others that are due come first now"


async def test_a_job_whose_holder_is_gone_expires_behind_its_tokens(
    client, keys, make_queue, submit, let_deadline_pass
):
    worker = make_queue("w1")
    await submit()
    entry = await take(worker)
    await worker.begin(entry, "a", None)
    await worker.append([Append("a", 1, TokensEvent(2, [7, 8], "xy"), publish=True)])
    await let_deadline_pass()
    await client.xclaim(keys.jobs("normal"), GROUP, "w1", 0, [entry.id], idle=15_001, justid=True)
    assert await expired(client, keys) == "expired"
    end = await last_event(client, keys)
    assert (end.position, end.usage, end.timings["attempts"]) == (2, {"num_output_tokens": 2}, 1)
    await assert_nothing_is_left(client, keys)

    # The holder was only slow: it is fenced, even if it would say the same.
    assert await worker.append([Append("a", 1, TokensEvent(3, [9], "z"), publish=True)]) == [Refusal.STALE]
    for status in (JobStatus.FINISHED, JobStatus.EXPIRED):
        assert await worker.finish(Finish(entry, 1, TerminalEvent(2, status, "a"), None)) == Refusal.STALE
    assert await worker.release(entry, "a", 1) is False
    assert await worker.delay(entry, "a", 1) is False
    assert (await worker.begin(entry, "a", None)).verdict == "stale"
    assert await client.xlen(keys.tokens("a")) == 2


@pytest.mark.parametrize("how", ["claimed", "released", "deleted consumer", "no entry"])
async def test_a_running_job_whose_entry_its_holder_has_not_expires(
    client, keys, make_queue, submit, let_deadline_pass, how
):
    worker, jobs = make_queue("w1"), keys.jobs("normal")
    await submit()
    entry = await take(worker)
    await worker.begin(entry, "a", None)
    await let_deadline_pass()
    match how:
        case "claimed":  # and not begun yet: begin would come too late
            await make_queue("w2").claim_idle(0, 1)
        case "released":
            await worker.release(entry, "a", 1)
        case "deleted consumer":
            await client.xgroup_delconsumer(jobs, GROUP, "w1")
        case "no entry":
            await client.xack(jobs, GROUP, entry.id)
            await client.xdel(jobs, entry.id)
    assert await expired(client, keys) == "expired"
    await assert_nothing_is_left(client, keys)


async def test_a_job_that_waits_in_the_fair_order_leaves_no_hole(
    client, keys, make_queue, submit, let_deadline_pass
):
    worker = make_queue("w1")
    for job_id in "abc":
        await submit(job_id, deadline_s=7200)
    assert (await take(worker)).id == (await client.hget(keys.job("a"), "entry")).decode()
    assert (await client.xpending(keys.jobs("normal"), GROUP))["consumers"][1]["name"].decode() == WAITING
    await let_deadline_pass("b")
    assert await expired(client, keys, "b") == "expired"
    assert (await take(worker)).id == (await client.hget(keys.job("c"), "entry")).decode()


async def test_each_way_to_an_end_forgets_the_deadline(client, keys, make_queue, submit):
    worker = make_queue("w1")
    await submit(deadline_s=7200)
    entry = await take(worker)
    await worker.begin(entry, "a", None)
    await worker.finish(Finish(entry, 1, TerminalEvent(0, JobStatus.FINISHED, "a"), None))
    await assert_nothing_is_left(client, keys)


async def test_many_that_are_due_are_ended_a_page_at_a_time(
    client, keys, make_queue, submit, let_deadline_pass
):
    running, waiting = make_queue("w1"), 3
    for number in range(MAX_EXPIRED + waiting):
        await submit(f"job-{number:03}", deadline_s=7200)
    for entry, number in zip(await running.take(MAX_EXPIRED), range(MAX_EXPIRED), strict=True):
        await running.begin(entry, f"job-{number:03}", None)
    for number in range(MAX_EXPIRED + waiting):
        await let_deadline_pass(f"job-{number:03}")
    assert await expire_due(client, keys, result_ttl_s=TTL_S) is True, "all of them run"
    assert await expire_due(client, keys, result_ttl_s=TTL_S) is False
    statuses = [await client.hget(keys.job(f"job-{MAX_EXPIRED + n:03}"), "status") for n in range(waiting)]
    assert statuses == [b"expired"] * waiting


async def test_foreign_things_under_a_jobs_keys_hold_up_no_other(
    client, keys, make_queue, submit, let_deadline_pass
):
    for job_id in ("a", "log", "record", "full", "replies"):
        await submit(job_id, deadline_s=7200, reply_to="foreign" if job_id == "replies" else None)
        await let_deadline_pass(job_id)
    await client.set(keys.tokens("log"), "x")
    await client.set(keys.job("record"), "x")
    await client.set(keys.replies("foreign"), "x")
    await client.xadd(keys.tokens("full"), {"event": b"x"}, id="9-0")
    await client.zadd(keys.deadlines, {b"\xff": 1, "gone": 1})
    await expire_due(client, keys, result_ttl_s=TTL_S)
    assert not await client.exists(keys.deadlines)
    assert (await last_event(client, keys)).status is JobStatus.EXPIRED
    assert (await last_event(client, keys, "replies")).status is JobStatus.EXPIRED
    assert (
        await client.hget(keys.job("full"), "status")
        == await client.hget(keys.job("log"), "status")
        == b"queued"
    )


@pytest.mark.parametrize("damage", [{"entry": "x"}, {"entry": "0-0"}, None])
async def test_an_entry_that_cannot_be_found_does_not_keep_a_job_from_its_end(
    client, keys, make_queue, submit, let_deadline_pass, damage
):
    await submit(deadline_s=7200)
    await let_deadline_pass()
    if damage:
        await client.hset(keys.job("a"), mapping=damage)
    else:
        await client.hdel(keys.job("a"), "entry")
    assert await expired(client, keys) == "expired"
    assert await client.xlen(keys.tokens("a")) == 1


@pytest.mark.parametrize("foreign", ["delayed", "bytes"])
async def test_what_lies_under_the_queues_keys_does_not_keep_a_job_from_its_end(
    client, keys, make_queue, submit, let_deadline_pass, foreign
):
    await submit(deadline_s=7200, not_before_s=3600)
    await let_deadline_pass()
    await client.delete(getattr(keys, foreign))
    await client.hset(getattr(keys, foreign), "x", "y")
    assert await expired(client, keys) == "expired"


async def test_nothing_hides_what_is_due_behind_it(client, keys, make_queue, submit, let_deadline_pass):
    """A job that can never be ended hides nothing either."""
    for number in range(MAX_EXPIRED):
        record = {"status": "queued", "deadline_at": 1, "position": 0 if number % 2 else "abc"}
        await client.hset(keys.job(f"bad-{number}"), mapping=record)
        await client.set(keys.tokens(f"bad-{number}"), "x")
    await client.zadd(keys.deadlines, {f"bad-{number}": 0 for number in range(MAX_EXPIRED)})
    await submit()
    await let_deadline_pass()
    assert await expire_due(client, keys, result_ttl_s=TTL_S) is True
    assert await expire_due(client, keys, result_ttl_s=TTL_S) is False
    assert await client.hget(keys.job("a"), "status") == b"expired"


async def test_a_job_that_moves_again_and_again_is_looked_at_later(
    client, keys, make_queue, submit, let_deadline_pass, monkeypatch
):
    await submit(deadline_s=7200)
    await let_deadline_pass()
    look, num_looks = expiry._read_due, 0

    async def look_and_move(*args):
        nonlocal num_looks
        num_looks += 1
        answers = await look(*args)
        await client.hset(keys.job("a"), "position", num_looks)
        return answers

    monkeypatch.setattr(expiry, "_read_due", look_and_move)
    assert await expired(client, keys) == "moved"
    assert num_looks == expiry.MAX_ATTEMPTS
    now_s, _ = await client.time()
    assert await client.zscore(keys.deadlines, "a") > now_s * 1000


async def test_whoever_looks_first_has_the_job_to_himself_for_a_while(
    client, keys, make_queue, submit, let_deadline_pass, monkeypatch
):
    """Otherwise every worker would read it. If the first one dies meanwhile, another one looks again."""
    await submit(deadline_s=7200)
    await let_deadline_pass()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(expiry, "_end", Mock(side_effect=KeyboardInterrupt))
        await expire_due(client, keys, result_ttl_s=TTL_S)
    await expire_due(client, keys, result_ttl_s=TTL_S)
    assert await client.hget(keys.job("a"), "status") == b"queued"
    assert await client.zscore(keys.deadlines, "a") > 1
    await let_deadline_pass()
    await expire_due(client, keys, result_ttl_s=TTL_S)
    assert await client.hget(keys.job("a"), "status") == b"expired"


async def test_only_what_is_to_be_ended_is_read(redis_url, keys, submit_large):
    client, num_jobs, num_bytes = submit_large
    before = (await client.info("stats"))["total_net_output_bytes"]
    answers = await expire(client, keys, [f"job-{n}" for n in range(num_jobs)], result_ttl_s=TTL_S)
    read = (await client.info("stats"))["total_net_output_bytes"] - before
    assert list(answers.values()) == ["early"] * (num_jobs - 2) + ["running", "expired"]
    assert num_bytes < read < 2 * num_bytes, "and it is read once"
    assert (await last_event(client, keys, f"job-{num_jobs - 1}")).metadata == {"n": 1}


async def test_a_large_job_is_read_by_itself(client, keys, make_queue, submit_overdue_with):
    """A hundred of them at once would be too much."""
    await submit_overdue_with("small", 100)
    await submit_overdue_with("large", expiry.MAX_BYTES_AT_ONCE)
    due = await expiry._read_due(client, keys, ["small", "large"])
    assert [bool(due[job_id].raw) for job_id in ("small", "large")] == [True, False]


@pytest.fixture
def submit_overdue_with(client, keys, let_deadline_pass):
    async def submit(job_id: str, num_bytes: int) -> None:
        submission = build_submission("x" * num_bytes, job_id=job_id, deadline_s=7200)
        await run_script(client, submission.script_call(keys))
        await let_deadline_pass(job_id)

    return submit


@pytest.fixture
async def submit_large(redis_url, keys):
    """Jobs of 200 KB: the last but one runs, the last one waits; the deadlines of both have passed."""
    client, num_jobs = redis.asyncio.from_url(redis_url, protocol=2), 6
    queue = Queue(keys, "w1", client, TINY, result_ttl_s=TTL_S, max_deaths=3, model_wait_s=60)
    await queue.create_groups()
    for number in range(num_jobs):
        if number == num_jobs - 1:
            *_, entry = await queue.take(num_jobs - 1)
            await queue.begin(entry, f"job-{number - 1}", None)
        submission = build_submission(
            "x" * 200_000, job_id=f"job-{number}", deadline_s=7200, metadata={"n": 1}
        )
        await run_script(client, submission.script_call(keys))
    for number in (num_jobs - 2, num_jobs - 1):
        await client.hset(keys.job(f"job-{number}"), "deadline_at", 1)
    yield client, num_jobs, len(submission.raw)
    await client.aclose()
