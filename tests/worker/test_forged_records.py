"""A producer that writes into the record or log of its own running job ends the job, not the worker."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from ingine.contract.calls.running import Finish
from ingine.contract.events import TerminalEvent, TokensEvent, encode_event
from ingine.contract.jobs import Job, decode_job, encode_job
from ingine.contract.record import JobStatus
from ingine.errors import BadRecord, ErrorCode
from ingine.producer import AsyncClient
from ingine.worker.jobs import MAX_ROLLBACKS
from tests.waiting import HANGS_S, wait_until_async
from tests.worker.conftest import Harness
from tests.worker.test_worker import ENDLESS, GREEDY

GREATEST_ID = f"{2**64 - 1}-{2**64 - 1}"
SMALL_LIES = (0, 1)


async def all_run(worker: Harness, job_ids: list[str]) -> None:
    for job_id in job_ids:
        await worker.push(Job(id=job_id, prompt="x", sampling=ENDLESS))
    for job_id in job_ids:

        async def is_past_the_lies() -> bool:  # at position 1 it would be no lie to say 1
            return await worker.position(job_id) > max(SMALL_LIES)  # noqa: B023

        await wait_until_async(is_past_the_lies, what="tokens")


async def are_alone_in_the_dead_letters(worker: Harness, job_ids: list[str]) -> None:
    async def letters() -> bool:
        return len(await worker.dead_letters()) >= len(job_ids)

    await wait_until_async(letters, what="the dead letters")
    found = {decode_job(letter[b"job"]).id: letter[b"code"] for letter in await worker.dead_letters()}
    assert found == dict.fromkeys(job_ids, ErrorCode.BAD_RECORD.encode())
    assert not worker.running.done()


async def is_exact(worker: Harness, job_id: str) -> None:
    """It has all of its tokens, under its first attempt."""
    end = await worker.end(job_id)
    assert (end.status, end.position, end.timings["attempts"]) == (JobStatus.FINISHED, 450, 1)


NONSENSE = ["abc", "-5", "1.5", "nan", "inf", "", b"\xff"]
LIES = [*map(str, SMALL_LIES), "01", "1000", str(2**53), str(2**64)]


@pytest.mark.parametrize("positions", [NONSENSE, LIES], ids=["nonsense", "lies"])
async def test_a_forged_position_ends_its_own_job_alone(harness, redis_url, positions):
    worker = await harness()
    bad = {f"bad-{number}": position for number, position in enumerate(positions)}
    await all_run(worker, [*bad, "good"])
    for job_id, position in bad.items():
        await worker.redis.hset(worker.keys.job(job_id), "position", position)
    await is_exact(worker, "good")
    await are_alone_in_the_dead_letters(worker, list(bad))
    await nobody_waits_for_them(worker, redis_url, list(bad))


async def nobody_waits_for_them(worker: Harness, redis_url: str, job_ids: list[str]) -> None:
    """Their logs have no end, and their records say that there will be none."""
    async with AsyncClient(redis_url, queue=worker.keys.queue) as client, asyncio.timeout(HANGS_S):
        for job_id in job_ids:
            with pytest.raises(BadRecord):
                await client.attach(job_id).result()
    for job_id in job_ids:
        assert await worker.redis.hget(worker.keys.job(job_id), "status") == b"failed"
        assert await worker.redis.pttl(worker.keys.job(job_id)) > 0
        assert await worker.redis.pttl(worker.keys.tokens(job_id)) > 0


def tokens(position: int, *token_ids: int) -> tuple[str, bytes]:
    return f"{position}-0", encode_event(TokensEvent(position, list(token_ids), "x" * len(token_ids)))


FIVE = [tokens(3, 65, 66, 67), tokens(5, 68, 69)]
BROKEN_LOGS = {
    "no-event": (1, [("1-0", b"\xc1")]),
    "no-map": (1, [("1-0", b"\x01")]),
    "no-ids": (1, [("1-0", encode_event(TokensEvent(1, ["x"], "x")))]),
    "a-gap": (3, [tokens(1, 65), tokens(3, 67)]),
    "overlap": (2, [tokens(1, 65), tokens(2, 65, 66)]),
    "other-id": (1, [("2-0", encode_event(TokensEvent(1, [65], "A")))]),
    "an-end": (1, [tokens(1, 65), ("1-1", encode_event(TerminalEvent(1, JobStatus.FINISHED, "an-end")))]),
    "none": (1, []),
    "at-0": (0, FIVE),
    "inside": (4, FIVE),
    "shorter": (3, FIVE),
    "longer": (500, FIVE),
}


async def leave_behind(worker: Harness, job_id: str, position: int, log: list[tuple[str, bytes]]) -> None:
    """Write the state that a dead worker, or another program, may have left."""
    for event_id, event in log:
        await worker.redis.xadd(worker.keys.tokens(job_id), {"event": event}, id=event_id)
    raw = encode_job(Job(id=job_id, prompt="x", sampling=GREEDY))
    await worker.redis.eval(
        LEAVE_BEHIND, 2, worker.keys.jobs("normal"), worker.keys.job(job_id), position, raw
    )


LEAVE_BEHIND = """
local entry = redis.call('XADD', KEYS[1], '*', 'job', ARGV[2])
local died = {'status', 'running', 'worker', 'dead', 'attempt', 1}
redis.call('HSET', KEYS[2], 'position', ARGV[1], 'entry', entry, unpack(died))
"""


async def test_a_log_that_is_none_or_not_the_record_s_ends_its_own_job_alone(harness):
    """Tokens would not go on where the record says: each worker that took such a job ended of it."""
    worker = await harness()
    for job_id, (position, log) in BROKEN_LOGS.items():
        await leave_behind(worker, job_id, position, log)
    await leave_behind(worker, "resumed", 5, FIVE)
    await worker.push(Job(id="good", prompt="x", sampling=ENDLESS))
    assert (await worker.end("resumed")).position == 24
    await is_exact(worker, "good")
    await are_alone_in_the_dead_letters(worker, list(BROKEN_LOGS))


async def test_a_position_that_is_forged_before_the_end_is_written(harness, monkeypatch):
    worker = await harness()
    finish, forged = worker.queue.finish, {"at-0": 0, "inside": 4, "at-5": 5, "behind": 600}

    async def finish_too_late(finishing: Finish) -> int:
        job_id = finishing.event.job_id
        await worker.redis.hset(worker.keys.job(job_id), "position", forged[job_id])
        return await finish(finishing)

    monkeypatch.setattr(worker.queue, "finish", finish_too_late)
    for job_id in forged:
        await leave_behind(worker, job_id, 5, FIVE)
    await are_alone_in_the_dead_letters(worker, list(forged))


async def test_a_log_that_is_taken_back_again_and_again_holds_nobody_up(harness, monkeypatch):
    """Each time all of it is sent anew: that is for a server that crashed, which it does not do for ever."""
    worker = await harness()
    append, num_forged = worker.queue.append, 0

    async def append_to_nothing(appends):
        nonlocal num_forged
        if any(append.job_id == "bad" for append in appends):
            num_forged += 1
            await worker.redis.delete(worker.keys.tokens("bad"))
            await worker.redis.hset(worker.keys.job("bad"), "position", 0)
        return await append(appends)

    monkeypatch.setattr(worker.queue, "append", append_to_nothing)
    for job_id in ("bad", "good"):
        await worker.push(Job(id=job_id, prompt="x", sampling=ENDLESS))
    await is_exact(worker, "good")
    await are_alone_in_the_dead_letters(worker, ["bad"])
    assert MAX_ROLLBACKS < num_forged <= 2 * (MAX_ROLLBACKS + 2)


async def use_up_the_log_s_ids(worker: Harness) -> None:
    await worker.redis.xadd(worker.keys.tokens("bad"), {"event": b"x"}, id=GREATEST_ID)


async def replace_the_log(worker: Harness) -> None:
    await worker.redis.delete(worker.keys.tokens("bad"))
    await worker.redis.set(worker.keys.tokens("bad"), "x")


async def replace_the_record(worker: Harness) -> None:
    await worker.redis.delete(worker.keys.job("bad"))
    await worker.redis.set(worker.keys.job("bad"), "x")


Attack = Callable[[Harness], Awaitable[None]]


@pytest.mark.parametrize("attack", [use_up_the_log_s_ids, replace_the_log, replace_the_record])
async def test_what_cannot_be_written_ends_its_own_job_alone(harness, attack: Attack):
    worker = await harness()
    await all_run(worker, ["bad", "good"])
    await attack(worker)
    await is_exact(worker, "good")
    await are_alone_in_the_dead_letters(worker, ["bad"])
    await worker.redis.delete(worker.keys.job("bad"), worker.keys.tokens("bad"))


@pytest.mark.parametrize("attack", [use_up_the_log_s_ids, replace_the_log])
async def test_a_log_that_never_could_be_written_ends_its_own_job_alone(harness, attack: Attack):
    worker = await harness()
    await attack(worker)
    for job_id in ("bad", "good"):
        await worker.push(Job(id=job_id, prompt="x", sampling=ENDLESS))
    await is_exact(worker, "good")
    await are_alone_in_the_dead_letters(worker, ["bad"])
    await worker.redis.delete(worker.keys.tokens("bad"))


@pytest.mark.parametrize("status", ["paused", "", b"\xff", "delayed", "finished", "cancelled"])
async def test_an_entry_whose_record_says_that_it_has_ended_is_not_thrown_away(
    client, keys, make_queue, push, status
):
    """Unless the log says so too: else a job would go without a word."""
    queue = make_queue("w1")
    entry_id = await push(Job(id="a", prompt="x"))
    (entry,) = await queue.take(1)
    await client.hset(keys.job("a"), mapping={"status": status, "entry": entry_id, "position": 1})
    with pytest.raises(Exception, match="BADRECORD its status"):
        await queue.begin(entry, "a", None)
    assert await client.xlen(keys.jobs("normal")) == 1


async def test_a_job_that_cannot_be_read_ends_in_its_record_if_it_was_accepted(harness, redis_url):
    """Its bytes count no more, and whoever waits for it is told."""
    worker = await harness()
    raw = encode_job(Job(id="bad", prompt="x")) + b"\xc1"
    submitted = {"status": "queued", "position": 0, "submitted_at": 1_700_000_000_000, "bytes": len(raw)}
    async with worker.redis.pipeline(transaction=True) as pipe:  # as submit.lua does
        pipe.xadd(worker.keys.jobs("normal"), {"job": raw, "cost": 1}, id="9999999999999-0")
        pipe.hset(worker.keys.job("bad"), mapping=submitted | {"entry": "9999999999999-0"})
        pipe.set(worker.keys.bytes, len(raw))
        await pipe.execute()
    await wait_until_async(worker.dead_letters, what="a dead letter")
    async with AsyncClient(redis_url, queue=worker.keys.queue) as client, asyncio.timeout(HANGS_S):
        with pytest.raises(BadRecord):
            await client.attach("bad").result()
    assert not await worker.redis.exists(worker.keys.bytes)
