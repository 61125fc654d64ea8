"""Jobs that workers died under, that failed, or whose time has not come."""

import asyncio

import pytest
import redis.asyncio
import redis.exceptions

from ingine.contract.events import TokensEvent
from ingine.contract.jobs import Job, encode_job
from ingine.contract.keys import GROUP, Keys, all_partitions
from ingine.contract.record import JobStatus
from ingine.engine.request import EngineRequest
from ingine.errors import EngineError, ErrorCode
from ingine.sampling_params import SamplingParams
from ingine.worker.hosting.engine_thread import MAX_STEPS_AHEAD, EngineThread
from ingine.worker.identity import name_of
from tests.waiting import wait_until_async
from tests.worker.conftest import take
from tests.worker.test_failures import break_steps, let_steps_hang, status
from tests.worker.test_pause import Turns
from tests.worker.test_worker import ENDLESS, GREEDY, leave_behind


async def test_a_suspect_has_the_worker_to_itself(harness):
    worker = await harness()
    await worker.push(Job(id="innocent", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("innocent"), what="tokens")
    suspect = Job(id="suspect", prompt="x", sampling=GREEDY)
    await leave_behind(worker, suspect, [TokensEvent(1, [65], "A")], deaths=1)
    await worker.push(Job(id="later", prompt="x", sampling=GREEDY))
    ends = {name: await worker.end(name) for name in ("innocent", "suspect", "later")}
    assert {end.status for end in ends.values()} == {JobStatus.FINISHED}
    times = {name: await worker.redis.hgetall(worker.keys.job(name)) for name in ends}
    assert int(times["suspect"][b"deaths"]) == 2
    assert int(times["innocent"][b"finished_at"]) <= int(times["suspect"][b"began_at"])
    assert int(times["suspect"][b"finished_at"]) <= int(times["later"][b"began_at"])


@pytest.mark.parametrize("way", ["new", "delivered with a lost reply"])
async def test_nothing_else_begins_while_a_suspect_does(harness, redis_url, queue, monkeypatch, way):
    """This includes jobs of other partitions: if a worker dies with the suspect, no other job shall be
    affected."""
    partitions = all_partitions(queue, 2)
    async with redis.asyncio.from_url(redis_url, protocol=2) as client:
        for keys in (*partitions, Keys(queue)):
            await client.hset(keys.settings, "partitions", 2)
    worker = await harness()
    prompts, other = worker.worker.prompts, worker.worker._partitions[1]
    read, reading, go_on = prompts.read, asyncio.Event(), asyncio.Event()

    async def read_slowly(*args):
        reading.set()
        await go_on.wait()
        return await read(*args)

    monkeypatch.setattr(prompts, "read", read_slowly)
    await wait_until_async(other.ready.is_set, what="the other partition")
    worker.keys = partitions[0]
    await leave_behind(worker, Job(id="suspect", prompt="x", sampling=GREEDY), [], deaths=1)
    await reading.wait()
    turns, stream = Turns(other.intake), partitions[1].jobs("normal")
    await turns.pass_by()  # among them a read that was under way
    innocent = {"job": encode_job(Job(id="innocent", prompt="x", sampling=GREEDY))}
    async with worker.redis.pipeline(transaction=True) as pipe:
        pipe.xadd(stream, innocent)
        if way == "delivered with a lost reply":
            pipe.xreadgroup(GROUP, other.queue.worker_id, {stream: ">"})
        await pipe.execute()
    other.intake._lost_delivery = True
    last = turns.num_begun + 4

    async def begun() -> bool:
        return bool(await worker.redis.exists(partitions[1].job("innocent")))

    async def begun_or_passed_by() -> bool:
        return await begun() or turns.num_begun > last

    await wait_until_async(begun_or_passed_by, what="turns of the other intake")
    has_begun = await begun()
    go_on.set()
    assert not has_begun
    assert (await worker.end("suspect")).status is JobStatus.FINISHED
    worker.keys = partitions[1]
    assert (await worker.end("innocent")).status is JobStatus.FINISHED
    record = await worker.redis.hmget(partitions[1].job("innocent"), "attempt", "deaths")
    assert record == [b"1", b"0"]


async def test_suspects_are_left_to_others_when_the_worker_stops(harness):
    worker = await harness()
    await worker.push(Job(id="innocent", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("innocent"), what="tokens")
    suspect = Job(id="suspect", prompt="x", sampling=GREEDY)
    await leave_behind(worker, suspect, [TokensEvent(1, [65], "A")], deaths=1)
    await wait_until_async(lambda: worker.worker._admission.num_suspects, what="the suspect")
    await worker.stop()
    other = await harness()
    assert (await other.end("suspect")).status is JobStatus.FINISHED
    assert (await other.end("innocent")).status is JobStatus.FINISHED


async def test_a_poisonous_job_ends_in_the_dead_letters_with_its_bytes(harness, tiny_engine, monkeypatch):
    engine = tiny_engine()
    break_steps(engine, monkeypatch, lambda ids: any(seq_id.startswith("poison") for seq_id in ids))
    worker = await harness(engine)
    poison = Job(id="poison", prompt="x", metadata={"row": 1})
    await worker.push(poison)
    end = await worker.end("poison")
    assert (end.status, end.error["code"], end.metadata) == (
        JobStatus.FAILED,
        ErrorCode.WORKER_LOST,
        {"row": 1},
    )
    (letter,) = await worker.dead_letters()
    assert letter[b"code"].decode() == ErrorCode.WORKER_LOST
    assert b"poison" in letter[b"job"] and b"3 workers" in letter[b"reason"]


async def test_a_step_that_hangs_ends_the_worker_and_counts_as_a_death(harness, tiny_engine, monkeypatch):
    engine = tiny_engine()
    hang, ended = let_steps_hang(engine, monkeypatch)
    worker = await harness(engine, step_timeout_s=4.0, drain_timeout_s=0.4)
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("a"), what="tokens")
    hang.set()
    try:
        with pytest.raises(EngineError, match="hangs"):
            await worker.running
        assert await status(worker, "a") == "delayed"
        assert await worker.redis.hget(worker.keys.job("a"), "deaths") == b"1"
    finally:
        ended.set()
        await wait_until_async(lambda: not worker.worker._engine.alive, what="the thread's end")
    other = await harness()
    assert (await other.end("a")).position == 450


async def test_a_server_that_is_away_is_no_step_that_hangs(tiny_engine):
    """Steps that nobody commits hold the engine up; however long that takes, no step is under way."""
    engine, delivered = tiny_engine(), []
    thread = EngineThread(lambda: engine)
    await thread.start(delivered.append)
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    thread.add(EngineRequest("a", [65, 66], params, arrival_time=0.0))
    try:
        one_more = MAX_STEPS_AHEAD + 1
        await wait_until_async(lambda: engine.stats().num_output_tokens == one_more, what="the last step")
        await wait_until_async(lambda: thread.step_began is None, what="the end of that step")
        assert len(delivered) == MAX_STEPS_AHEAD
    finally:
        await thread.stop()


async def test_a_step_on_its_way_is_delivered_when_the_engine_stops(tiny_engine):
    """Scheduled ahead, the last step is still computed when there is no next one any more."""
    engine, delivered = tiny_engine(async_scheduling=True), []
    thread = EngineThread(lambda: engine)

    def take(outputs):
        delivered.extend(outputs)
        thread.credit()
        if len(delivered) == 5:
            thread.request_stop()

    await thread.start(take)
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    thread.add(EngineRequest("a", [65, 66], params, arrival_time=0.0))
    await wait_until_async(lambda: not thread.alive, what="the thread's end")
    [seq] = engine._scheduler.running
    assert seq.num_pending_tokens == 0 and seq.num_output_tokens >= 6
    await wait_until_async(lambda: len(delivered) == seq.num_output_tokens, what="the last token")


async def test_a_job_of_a_bare_xadd_waits_for_its_time_too(harness):
    worker = await harness()
    await worker.push(Job(id="later", prompt="x", sampling=GREEDY, not_before_ms=1500))
    await worker.push(Job(id="now", prompt="x", sampling=GREEDY))
    await worker.end("now")
    await wait_until_async(lambda: worker.redis.zcard(worker.keys.delayed), what="the delay")
    assert (await worker.end("later")).status is JobStatus.FINISHED
    record = await worker.redis.hgetall(worker.keys.job("later"))
    assert int(record[b"began_at"]) >= int(record[b"submitted_at"]) + 1500
    assert record[b"deaths"] == b"0"


async def test_suspects_are_shared_out_among_idle_workers(harness):
    """None of them is kept waiting by the one whose turn comes first."""
    first, second = await harness(), await harness()
    names = [f"suspect-{number}" for number in range(4)]
    for name in names:
        await first.push(Job(id=name, prompt="x", sampling=ENDLESS))
    for name in names:
        await wait_until_async(lambda: first.position(name), what="tokens")  # noqa: B023
    for name in names:
        await first.redis.hset(first.keys.job(name), mapping={"deaths": 2})
    await first.stop()
    await second.stop()
    heirs = [await harness(worker_id=name) for name in ("heir-1", "heir-2")]
    for name in names:
        assert (await heirs[0].end(name)).status is JobStatus.FINISHED
    records = [await first.redis.hgetall(first.keys.job(name)) for name in names]
    holders = {name_of(record[b"worker"].decode()) for record in records}
    assert holders == {"heir-1", "heir-2"}


async def test_a_suspect_whose_server_is_away_keeps_no_other_job_waiting(harness, monkeypatch):
    worker = await harness()
    admission, queue, admit = worker.worker._admission, worker.queue, worker.worker._admission.admit
    await worker.push(Job(id="innocent", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("innocent"), what="tokens")
    suspect = Job(id="suspect", prompt="x", sampling=GREEDY)
    await leave_behind(worker, suspect, [TokensEvent(1, [65], "A")], deaths=1)
    await wait_until_async(lambda: admission.num_suspects, what="the suspect")

    async def away(*args, **options):
        raise redis.exceptions.ConnectionError("away")

    monkeypatch.setattr(admission, "admit", away)
    monkeypatch.setattr(queue, "own_pending", away)
    await wait_until_async(lambda: not admission.num_suspects, what="room for others")
    monkeypatch.undo()
    assert admission.admit == admit
    assert (await worker.end("suspect")).status is JobStatus.FINISHED


async def test_a_prompt_that_takes_long_to_read_costs_no_lease(harness, monkeypatch):
    slow, other = await harness(lease_s=2.0), await harness(lease_s=2.0)
    began, go_on = asyncio.Event(), asyncio.Event()
    read = slow.worker.prompts.read

    async def read_slowly(*args):
        began.set()
        await go_on.wait()
        return await read(*args)

    for worker in (slow, other):
        monkeypatch.setattr(worker.worker.prompts, "read", read_slowly)
    await slow.push(Job(id="a", prompt="x", sampling=GREEDY))
    await began.wait()
    began_at = int(await slow.redis.hget(slow.keys.job("a"), "began_at"))

    async def three_leases_are_over() -> bool:
        now_s, now_us = await slow.redis.time()
        return now_s * 1000 + now_us // 1000 > began_at + 6000

    await wait_until_async(three_leases_are_over)
    go_on.set()
    end = await slow.end("a")
    assert (end.status, end.timings["attempts"]) == (JobStatus.FINISHED, 1)


async def test_a_job_that_is_to_be_cancelled_does_not_pause_after_a_failed_step(
    make_queue, push, client, keys
):
    queue = make_queue("w1")
    await push(Job(id="a", prompt="x"))
    entry = await take(queue)
    begun = await queue.begin(entry, "a", None)
    await client.hset(keys.job("a"), mapping={"cancel": 1, "deaths": 1})
    assert await queue.delay(entry, "a", begun.attempt)
    await queue.promote()
    assert (await queue.begin(await take(queue), "a", None)).cancelled
