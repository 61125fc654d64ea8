"""Workers of different models on one queue: who refuses to start, and who takes what."""

import asyncio

import pytest

from ingine.errors import ConfigError, ErrorCode
from ingine.fingerprint import model_fingerprint
from ingine.keys import parked
from ingine.sampling_params import SamplingParams
from ingine.wire import Job, JobStatus, TokensEvent
from tests.served_models import OTHER, TINY, TINY_IN_BFLOAT16
from tests.tiny_models import make_tiny_model
from tests.waiting import wait_until_async
from worker.cli import build_engine
from worker.identity import name_of
from worker.queue import Append
from worker.settings import WorkerSettings

JOB = Job(id="job", prompt="x")
FOR_OTHER = Job(id="named", prompt="x", model="other")
LONG = SamplingParams(max_tokens=400, ignore_eos=True)


async def take_half_made(make_queue, push, *, made_by=OTHER, then="release"):
    """A job with one token, made by a worker of `made_by` that has handed it over, or has died."""
    first = make_queue("first", made_by)
    await push(JOB)
    (entry,) = await first.take(1)
    begun = await first.begin(entry, JOB.id, None)
    assert await first.append([Append(JOB.id, begun.attempt, TokensEvent(1, [7], "a"), publish=False)]) == [1]
    if then == "release":
        assert await first.release(entry, JOB.id, begun.attempt)
    return first


# The scripts


async def test_what_another_model_began_is_not_resumed_but_parked(client, keys, make_queue, push):
    first, second = await take_half_made(make_queue, push), make_queue("second", TINY)
    (entry,) = await second.claim_idle(3600, 10)
    begun = await second.begin(entry, JOB.id, None)
    assert (begun.verdict, begun.fingerprint) == ("other_model", OTHER.fingerprint)
    assert await second.park(entry, JOB.id, begun.fingerprint)

    assert await second.claim_idle(0, 10) == [], "parked for others"
    (entry,) = await first.claim_idle(3600, 10)
    begun = await first.begin(entry, JOB.id, None)
    assert (begun.verdict, begun.position, begun.deaths) == ("run", 1, 0)
    assert await first.committed(JOB.id) == [7]


async def test_with_nothing_committed_any_model_may_begin_anew(make_queue, push):
    first, second = make_queue("first", OTHER), make_queue("second", TINY)
    await push(JOB)
    (entry,) = await first.take(1)
    begun = await first.begin(entry, JOB.id, None)
    await first.release(entry, JOB.id, begun.attempt)
    (entry,) = await second.claim_idle(3600, 10)
    assert (await second.begin(entry, JOB.id, None)).verdict == "run"


async def test_a_death_is_counted_though_another_model_finds_it(client, keys, make_queue, push):
    await take_half_made(make_queue, push, then="die")
    second = make_queue("second", TINY)
    (entry,) = await second.claim_idle(0, 10)
    assert (await second.begin(entry, JOB.id, None)).verdict == "other_model"
    assert await second.park(entry, JOB.id, OTHER.fingerprint)
    assert await second.park(entry, JOB.id, OTHER.fingerprint) is False, "it is not ours any more"
    assert await client.hmget(keys.job(JOB.id), "status", "deaths", "worker") == [b"queued", b"1", b""]


async def test_what_is_parked_is_anybodys_when_nobody_serves_its_model_any_more(make_queue, push):
    await take_half_made(make_queue, push)
    second = make_queue("second", TINY)
    (entry,) = await second.claim_idle(3600, 10)
    await second.park(entry, JOB.id, OTHER.fingerprint)

    second.served_elsewhere, second.model_wait_s = frozenset({OTHER.fingerprint}), 0.0
    assert await second.claim_idle(0, 10) == [], "a worker of it lives"
    second.served_elsewhere = frozenset()
    (entry,) = await second.claim_idle(3600, 10)
    assert entry.abandoned
    begun = await second.begin(entry, JOB.id, None)
    assert (begun.verdict, begun.fingerprint) == ("run", OTHER.fingerprint)


async def test_a_cancelled_job_is_ended_by_a_worker_of_any_model(client, keys, make_queue, push):
    await take_half_made(make_queue, push)
    await client.hset(keys.job(JOB.id), "cancel", 1)
    second = make_queue("second", TINY)
    (entry,) = await second.claim_idle(3600, 10)
    begun = await second.begin(entry, JOB.id, None)
    assert (begun.verdict, begun.cancelled) == ("run", True)


# Workers


async def test_a_worker_of_another_model_refuses_to_start(harness):
    await harness()
    second = await harness(model=OTHER)
    with pytest.raises(ConfigError, match=r"served by tiny .*w0.*this worker has other.*INGINE_QUEUE"):
        await second.running
    third = await harness(model=TINY_IN_BFLOAT16)
    with pytest.raises(ConfigError, match=r"tiny .*:bfloat16"):
        await third.running
    fourth = await harness()
    await wait_until_async(lambda: fourth.worker._partitions[0].ready.is_set(), what="the fourth")
    names = [name_of(worker_id.decode()) for worker_id in await fourth.redis.hkeys(fourth.keys.workers)]
    assert sorted(names) == ["w0", "w3"]


async def test_of_two_that_start_at_the_same_moment_one_gives_way(harness):
    first, second = await asyncio.gather(harness(worker_id="a"), harness(worker_id="b", model=OTHER))
    running = {first.running, second.running}
    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    (ended,) = (task for task in running if task.done())
    assert isinstance(ended.exception(), ConfigError)


async def test_the_worker_before_may_be_dead_or_of_an_older_version(harness, queue):
    """Neither a heartbeat that has stopped nor one that tells no model keeps a worker from its queue."""
    first = await harness()
    beat = first.redis.hset
    await beat(first.keys.workers, "older", b"\x82\xa4at_s\xce\x7f\xff\xff\xff\xa5model\xa5older")
    await first.stop()
    second = await harness(model=OTHER)
    await second.push(JOB)
    assert (await second.end(JOB.id)).status is JobStatus.FINISHED


async def test_a_job_that_names_a_model_is_left_to_the_worker_that_serves_it(harness):
    other = await harness(model=OTHER)
    tiny = await harness(mixed_models=True)
    jobs = [FOR_OTHER.model_copy(update={"id": f"named-{n}"}) for n in range(8)]
    for job in jobs:
        await other.push(job)
    for job in jobs:
        end = await tiny.end(job.id)
        assert end.status is JobStatus.FINISHED, end
        worker = await tiny.redis.hget(tiny.keys.job(job.id), "model")
        assert worker.decode() == OTHER.fingerprint


async def test_a_job_that_names_a_model_nobody_serves_fails_at_once(harness):
    tiny = await harness(mixed_models=True)
    await tiny.push(Job(id="typo", prompt="x", model="tyni"))
    end = await tiny.end("typo")
    assert end.error["code"] == ErrorCode.UNKNOWN_MODEL
    assert "tiny" in end.error["message"]


async def test_a_job_waits_for_its_model_and_then_fails(harness):
    other = await harness(model=OTHER)
    tiny = await harness(mixed_models=True, model_wait_s=1.0)
    intake = tiny.worker._partitions[0].queue
    await wait_until_async(lambda: "other" in intake.served_elsewhere, what="what the other serves")
    await other.stop()
    await tiny.push(FOR_OTHER)
    end = await tiny.end(FOR_OTHER.id)
    assert end.error["code"] == ErrorCode.UNKNOWN_MODEL


async def test_in_a_rolling_change_a_log_is_never_continued_by_another_model(harness):
    old = await harness(model=OTHER)
    await old.push(Job(id="long", prompt="x", sampling=LONG))
    await wait_until_async(lambda: old.position("long"), what="its first tokens")
    new = await harness(mixed_models=True, model_wait_s=1.0)
    await old.stop()
    released_at = await old.position("long")
    end = await new.end("long")
    assert (end.status, end.error["code"]) == (JobStatus.FAILED, ErrorCode.MODEL_CHANGED)
    assert OTHER.fingerprint in end.error["message"]
    assert end.position == released_at
    assert await new.redis.xpending_range(new.keys.jobs("normal"), "workers", "-", "+", 1) == []


async def test_the_same_weights_in_other_numbers_go_on_in_the_end(harness):
    old = await harness(model=TINY_IN_BFLOAT16)
    await old.push(Job(id="long", prompt="x", sampling=LONG))
    await wait_until_async(lambda: old.position("long"), what="its first tokens")
    new = await harness(mixed_models=True, model_wait_s=1.0)
    await old.stop()
    assert (await new.end("long")).status is JobStatus.FINISHED


async def test_nobody_counts_what_is_parked_as_running(harness, redis_url, queue):
    from producer import AsyncClient

    other = await harness(model=OTHER)
    tiny = await harness(mixed_models=True)
    intake = tiny.worker._partitions[0].queue
    await wait_until_async(lambda: "other" in intake.served_elsewhere, what="what the other serves")
    await other.stop()
    await tiny.push(FOR_OTHER)

    async def parked_entries() -> int:
        consumers = await tiny.redis.xinfo_consumers(tiny.keys.jobs("normal"), "workers")
        return sum(c["pending"] for c in consumers if c["name"].decode() == parked("other"))

    await wait_until_async(parked_entries, what="the job to be parked")
    async with AsyncClient(redis_url, queue=queue) as client:
        info = await client.queue_info()
    assert (info.waiting["normal"], info.running["normal"]) == (1, 0)


def test_a_worker_knows_its_model_by_content_and_numbers(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        make_tiny_model(folder, seed=seed)
    models = []
    for folder, dtype in ((folders[0], "float32"), (folders[0], "bfloat16"), (folders[1], "float32")):
        options = {"device": "cpu", "kv_cache_bytes": 8 << 20, "dtype": dtype, "model": str(folder)}
        engine, model = build_engine(WorkerSettings(_env_file=None, **options))
        engine.close()
        models.append(model)
    first, in_bfloat16, second = models
    assert first.fingerprint == f"{model_fingerprint(folders[0])}:float32"
    assert first.same_weights(in_bfloat16.fingerprint) and not first.same_weights(second.fingerprint)
