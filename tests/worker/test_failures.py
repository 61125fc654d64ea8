"""A worker loses nothing when a part of it, its server or its queue's keys fail."""

import asyncio
import sys
import threading

import msgpack
import pytest
import redis.exceptions

from ingine.contract.events import TokensEvent
from ingine.contract.jobs import Job, encode_job
from ingine.contract.keys import Keys
from ingine.contract.record import JobStatus
from ingine.errors import EngineError, ErrorCode
from ingine.worker import admission
from ingine.worker.hosting.engine_thread import EngineThread
from ingine.worker.output_handler import MAX_FAILED_COMMITS
from ingine.worker.settings import WorkerSettings
from ingine.worker.worker import Worker
from tests.served_models import TINY
from tests.servers import durable_server
from tests.waiting import HANGS_S, wait_until_async
from tests.worker.test_worker import ENDLESS, GREEDY, ask_to_cancel, leave_behind


def break_steps(engine, monkeypatch, should_break) -> None:
    """Steps raise where `should_break(ids of the batch's sequences)`."""
    forward = engine._runner.forward

    def forward_or_break(batch):
        if should_break([seq.seq_id for seq in batch.seqs]):
            raise RuntimeError("the model broke")
        return forward(batch)

    monkeypatch.setattr(engine._runner, "forward", forward_or_break)


def let_steps_hang(engine, monkeypatch) -> tuple[threading.Event, threading.Event]:
    """Steps hang once the first event is set, until the second one is."""
    hang, ended = threading.Event(), threading.Event()
    forward = engine._runner.forward

    def forward_or_hang(batch):
        if hang.is_set():
            assert ended.wait(HANGS_S)
        return forward(batch)

    monkeypatch.setattr(engine._runner, "forward", forward_or_hang)
    return hang, ended


async def status(worker, job_id: str) -> str:
    return (await worker.redis.hget(worker.keys.job(job_id), "status") or b"").decode()


async def test_innocents_finish_beside_a_poisonous_job(harness, tiny_engine, monkeypatch):
    engine = tiny_engine()
    break_steps(engine, monkeypatch, lambda ids: any(seq_id.startswith("poison") for seq_id in ids))
    worker = await harness(engine)
    names = ["a", "b", "poison", "c", "d"]
    for name in names:
        await worker.push(Job(id=name, prompt=name, sampling=GREEDY))
    ends = {name: await worker.end(name) for name in names}
    assert ends.pop("poison").error["code"] == ErrorCode.WORKER_LOST
    assert {end.status for end in ends.values()} == {JobStatus.FINISHED}
    assert {end.timings["attempts"] for end in ends.values()} == {1}


async def test_a_batch_that_breaks_as_a_whole_goes_on_one_by_one(harness, tiny_engine, monkeypatch):
    """Memory may be enough for each sequence, but not for all of them."""
    engine = tiny_engine()
    break_steps(engine, monkeypatch, lambda ids: len(ids) > 1)
    worker = await harness(engine)
    for name in "abc":
        await worker.push(Job(id=name, prompt=name, sampling=GREEDY))
    assert {(await worker.end(name)).status for name in "abc"} == {JobStatus.FINISHED}


async def test_a_broken_engine_ends_the_worker_and_its_jobs_go_on(harness, tiny_engine, monkeypatch):
    engine = tiny_engine()
    broken = threading.Event()
    break_steps(engine, monkeypatch, lambda ids: broken.is_set())
    first = await harness(engine)
    for name in "abc":
        await first.push(Job(id=name, prompt=name, sampling=ENDLESS))
    await wait_until_async(lambda: first.position("c"), what="tokens")
    broken.set()
    with pytest.raises(EngineError, match="the model broke"):
        await first.running
    second = await harness()
    assert {(await second.end(name)).position for name in "abc"} == {450}
    with pytest.raises(EngineError):
        first.running.result()


async def test_a_cancelled_job_ends_even_if_the_next_step_raises(harness, tiny_engine, monkeypatch):
    engine = tiny_engine()
    to_break = threading.Event()

    def once(ids) -> bool:
        broke = to_break.is_set()
        to_break.clear()
        return broke

    break_steps(engine, monkeypatch, once)
    worker = await harness(engine)
    for name in "ab":
        await worker.push(Job(id=name, prompt=name, sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("b"), what="tokens")
    abort = engine.abort
    monkeypatch.setattr(engine, "abort", lambda seq_id: (to_break.set(), abort(seq_id))[1])
    await ask_to_cancel(worker, "a")
    assert (await worker.end("a")).status is JobStatus.CANCELLED
    assert (await worker.end("b")).status is JobStatus.FINISHED


async def test_a_log_that_this_model_cannot_go_on_from_fails_its_job_alone(harness):
    """Written by a worker of another model, with another vocabulary."""
    worker = await harness()
    await worker.push(Job(id="innocent", prompt="x", sampling=ENDLESS))
    await leave_behind(
        worker, Job(id="foreign", prompt="x", sampling=GREEDY), [TokensEvent(1, [100_000], "x")]
    )
    end = await worker.end("foreign")
    assert (end.status, end.error["code"]) == (JobStatus.FAILED, ErrorCode.INVALID_TOKEN_ID)
    innocent = await worker.end("innocent")
    assert (innocent.status, innocent.timings["attempts"]) == (JobStatus.FINISHED, 1)


async def test_a_hand_over_outlasts_an_error_of_the_server(harness, monkeypatch):
    worker = await harness()
    for name in "abc":
        await worker.push(Job(id=name, prompt=name, sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("c"), what="tokens")
    queue, release = worker.queue, worker.queue.release
    errors = iter([redis.exceptions.ConnectionError("gone"), redis.exceptions.OutOfMemoryError("full")])

    async def release_at_last(*args, **options):
        if error := next(errors, None):
            raise error
        return await release(*args, **options)

    monkeypatch.setattr(queue, "release", release_at_last)
    await worker.stop()
    assert {await status(worker, name) for name in "abc"} == {"queued"}


async def test_a_step_that_cannot_be_committed_counts_as_a_death_of_its_jobs(harness, monkeypatch):
    """Otherwise the job that causes it would end one worker after the other."""
    worker = await harness()
    commit = worker.worker._publisher.commit

    async def commit_or_break(outputs):
        # Of a job that has been let go nothing is committed, so nothing breaks either.
        ours = filter(worker.worker._jobs.by_seq, (output.seq_id for output in outputs))
        if any(seq_id.startswith("poison") for seq_id in ours):
            raise ZeroDivisionError
        await commit(outputs)

    monkeypatch.setattr(worker.worker._publisher, "commit", commit_or_break)
    names = ["a", "b", "poison", "c", "d"]
    for name in names:
        await worker.push(Job(id=name, prompt=name, sampling=GREEDY))
    ends = {name: await worker.end(name) for name in names}
    assert ends.pop("poison").error["code"] == ErrorCode.WORKER_LOST
    assert {end.status for end in ends.values()} == {JobStatus.FINISHED}
    assert not worker.running.done()


async def test_a_worker_that_can_commit_nothing_ends_and_its_jobs_go_on(harness, monkeypatch):
    worker = await harness()
    broken = asyncio.Event()
    append = worker.queue.append

    async def append_or_break(appends):
        if broken.is_set():
            raise ZeroDivisionError
        return await append(appends)

    monkeypatch.setattr(worker.queue, "append", append_or_break)
    names = [f"job-{number}" for number in range(MAX_FAILED_COMMITS)]
    for name in names:
        await worker.push(Job(id=name, prompt=name, sampling=ENDLESS))
    for name in names:
        await wait_until_async(lambda name=name: worker.position(name), what="tokens")
    broken.set()
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        await worker.running
    heir = await harness()
    ends = [await heir.end(name) for name in names]
    finished = [end for end in ends if end.status is JobStatus.FINISHED]
    assert {end.position for end in finished} == {450}
    # If one lane has them all, they fail together twice, and then one of them alone a third time.
    assert len(finished) >= len(names) - 1
    assert {end.error["code"] for end in ends if end not in finished} <= {ErrorCode.WORKER_LOST}


async def test_an_entry_that_sets_off_a_fault_before_it_is_begun_ends_no_worker(harness, monkeypatch):
    worker = await harness()
    decode = admission.decode_job

    def decode_or_break(raw, **options):
        if b"poison" in raw:
            raise KeyError("/srv/secret")
        return decode(raw, **options)

    for module in [module for name, module in sys.modules.items() if name.startswith("ingine.worker.")]:
        if hasattr(module, "decode_job"):  # whoever reads it later breaks too
            monkeypatch.setattr(module, "decode_job", decode_or_break)
    await worker.push(Job(id="a", prompt="poison", sampling=GREEDY))
    await worker.push(Job(id="b", prompt="x", sampling=GREEDY))
    assert (await worker.end("b")).status is JobStatus.FINISHED
    (letter,) = await wait_until_async(worker.dead_letters, what="the dead letter")
    assert letter[b"code"].decode() == ErrorCode.ENGINE_ERROR
    assert letter[b"reason"] == b"the worker met a fault of its own at this entry: KeyError"


async def test_an_engine_that_cannot_say_what_it_ran_counts_a_death_for_all_that_it_may_have_been(
    harness, tiny_engine, monkeypatch
):
    engine, broken = tiny_engine(), threading.Event()
    count = engine.stats
    monkeypatch.setattr(engine, "stats", lambda: 1 / 0 if broken.is_set() else count())
    ids = type(engine).running_seq_ids
    unknown = property(lambda self: [] if broken.is_set() else ids.fget(self))
    monkeypatch.setattr(type(engine), "running_seq_ids", unknown)
    worker = await harness(engine)
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("a"), what="tokens")
    broken.set()
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        await worker.running
    assert await worker.redis.hget(worker.keys.job("a"), "deaths") == b"1"


async def test_a_step_that_hangs_does_not_keep_the_jobs_nor_the_process(harness, tiny_engine, monkeypatch):
    engine = tiny_engine()
    hang, ended = let_steps_hang(engine, monkeypatch)
    worker = await harness(engine, drain_timeout_s=0.4)
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("a"), what="tokens")
    hang.set()
    try:
        await worker.stop()
        assert await status(worker, "a") == "queued"
    finally:
        ended.set()
        await wait_until_async(lambda: not worker.worker._engine.alive, what="the thread's end")


async def test_a_worker_that_waits_for_its_server_can_be_stopped(queue, tiny_engine):
    settings = WorkerSettings(_env_file=None, queue=queue, http_port=-1)
    worker = Worker(settings, "redis://127.0.0.1:1/0", EngineThread(tiny_engine), model=TINY)
    running = asyncio.create_task(worker.run())
    worker.stop()
    async with asyncio.timeout(HANGS_S):
        await running


async def test_a_worker_waits_for_a_server_that_comes_later(queue, tiny_engine, tmp_path):
    with durable_server(tmp_path) as server:
        url, port = server.url, server.port
    settings = WorkerSettings(_env_file=None, queue=queue, http_port=-1, worker_id="early")
    worker = Worker(settings, url, EngineThread(tiny_engine), model=TINY)
    running = asyncio.create_task(worker.run())
    with durable_server(tmp_path, port=port):
        keys = Keys(queue)
        redis_client = worker._servers.client(keys)
        await wait_until_async(lambda: redis_client.hexists(keys.workers, worker.id), what="the start")
        worker.stop()
        await running


async def test_values_that_anybody_may_write_harm_no_worker(harness):
    worker = await harness()
    await worker.redis.hset(worker.keys.settings, mapping={"max_job_bytes": "1e6", "paused": "maybe"})
    await worker.redis.hset(worker.keys.workers, "junk", b"\xc1")
    await worker.redis.hset(worker.keys.workers, "list", msgpack.packb([1]))
    await worker.redis.spublish(worker.keys.control, msgpack.packb({"command": "pause"}))
    await worker.push(Job(id="a", prompt="x", sampling=GREEDY))
    assert (await worker.end("a")).status is JobStatus.FINISHED
    assert not worker.running.done()


async def test_a_record_of_another_type_does_not_hold_up_the_queue(harness):
    worker = await harness()
    await worker.redis.set(worker.keys.job("bad"), "x")
    await worker.push(Job(id="bad", prompt="x", sampling=GREEDY))
    await worker.push(Job(id="good", prompt="x", sampling=GREEDY))
    assert (await worker.end("good")).status is JobStatus.FINISHED
    (dead,) = await worker.dead_letters()
    assert dead[b"code"].decode() == ErrorCode.BAD_RECORD
    await worker.redis.delete(worker.keys.job("bad"))


async def test_a_tokenizer_that_breaks_on_one_job_fails_that_job(harness, tiny_engine, monkeypatch):
    engine = tiny_engine()
    encode = engine.tokenizer.encode
    monkeypatch.setattr(engine.tokenizer, "encode", lambda text: 1 / 0 if text == "bad" else encode(text))
    worker = await harness(engine)
    await worker.push(Job(id="bad", prompt="bad", metadata={"row": 1}))
    await worker.push(Job(id="good", prompt="good", sampling=GREEDY))
    end = await worker.end("bad")
    assert (end.error["code"], end.metadata) == (ErrorCode.ENGINE_ERROR, {"row": 1})
    assert end.error["message"] == "the prompt cannot be tokenised: ZeroDivisionError"
    assert (await worker.end("good")).status is JobStatus.FINISHED


async def test_a_job_that_sets_off_a_fault_of_ours_ends_and_nobody_died(harness, monkeypatch):
    """The producer gets its type alone: what else it says may be anything that a worker knows."""
    worker = await harness()

    def read(*_):
        raise KeyError("/srv/secret")

    monkeypatch.setattr(worker.worker.prompts, "read", read)
    await worker.push(Job(id="bad", prompt="x", metadata={"row": 1}))
    end = await worker.end("bad")
    assert (end.error["code"], end.metadata) == (ErrorCode.ENGINE_ERROR, {"row": 1})
    assert end.error["message"] == "the worker met a fault of its own at this job: KeyError"
    assert await worker.redis.hget(worker.keys.job("bad"), "deaths") == b"0"
    assert not worker.running.done()


async def test_jobs_whose_ids_are_no_times_of_the_past_run(harness):
    """A nanosecond id is inherited by everybody's later `*`."""
    worker = await harness()
    stream = worker.keys.jobs("normal")
    for job_id, entry_id in [("small", "1-1"), ("huge", f"{10**18}-0"), ("late", "*")]:
        raw = encode_job(Job(id=job_id, prompt="x", sampling=GREEDY, deadline_ms=3_600_000))
        await worker.redis.xadd(stream, {"job": raw}, id=entry_id)
    for job_id in ("small", "huge", "late"):
        end = await worker.end(job_id)
        assert end.status is JobStatus.FINISHED
        assert 0 <= end.timings["queue_ms"] < 3_600_000


async def test_no_nudge_makes_a_worker_take_more_than_it_has_room_for(harness, tiny_engine):
    worker = await harness(tiny_engine(max_num_seqs=2))
    for number in range(8):
        await worker.push(Job(id=f"j{number}", prompt="x", sampling=ENDLESS))
        await worker.redis.spublish(worker.keys.control, msgpack.packb({"command": "released"}))
    await wait_until_async(lambda: worker.position("j1"), what="tokens")
    assert await worker.num_held() == 2
    for number in range(8):
        await ask_to_cancel(worker, f"j{number}")


async def test_metadata_comes_back_from_the_door(harness):
    worker = await harness()
    await worker.redis.hset(worker.keys.settings, "paused", 1)
    await worker.push(Job(id="late", prompt="x", deadline_ms=1, metadata={"row": 7}))
    await worker.redis.hdel(worker.keys.settings, "paused")
    end = await worker.end("late")
    assert (end.status, end.metadata) == (JobStatus.EXPIRED, {"row": 7})


async def test_a_worker_that_cannot_renew_does_not_serve_on(harness, monkeypatch):
    worker = await harness(lease_s=0.5)
    await worker.push(Job(id="a", prompt="x", sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("a"), what="tokens")

    async def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr(worker.worker._leases, "_renew_all", broken)
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        async with asyncio.timeout(HANGS_S):
            await asyncio.shield(worker.running)
    assert await status(worker, "a") in ("queued", "finished")  # not left behind


@pytest.mark.parametrize("part", ["stats", "abort"])
async def test_an_engine_that_loses_count_ends_the_worker(harness, tiny_engine, monkeypatch, part):
    engine, broken = tiny_engine(), threading.Event()
    break_steps(engine, monkeypatch, lambda ids: broken.is_set() and part == "abort")
    count = getattr(engine, part)
    monkeypatch.setattr(engine, part, lambda *args: 1 / 0 if broken.is_set() else count(*args))
    worker = await harness(engine)
    for name in "ab":
        await worker.push(Job(id=name, prompt=name, sampling=ENDLESS))
    await wait_until_async(lambda: worker.position("b"), what="tokens")
    broken.set()
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        async with asyncio.timeout(HANGS_S):
            await asyncio.shield(worker.running)
    assert {await status(worker, name) for name in "ab"} <= {"queued", "delayed"}
