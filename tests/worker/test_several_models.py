"""Workers of different models on one queue: who refuses to start, and who takes what."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import SimpleNamespace
from unittest.mock import AsyncMock

import pytest
import redis.asyncio

import ingine.worker.startup
from ingine.cli.worker import build_engine
from ingine.contract.calls.running import Append
from ingine.contract.events import TokensEvent
from ingine.contract.jobs import Job, encode_job
from ingine.contract.keys import GROUP, Keys, Priority, parked
from ingine.contract.record import JobStatus
from ingine.engine.store.fingerprint import model_fingerprint
from ingine.errors import ConfigError, ErrorCode
from ingine.producer import AsyncClient
from ingine.sampling_params import SamplingParams
from ingine.worker.identity import name_of
from ingine.worker.queue import Queue
from ingine.worker.served_model import ServedModel
from ingine.worker.settings import WorkerSettings
from tests.served_models import OTHER, TINY, TINY_IN_BFLOAT16
from tests.tiny_models import make_tiny_model
from tests.waiting import wait_until_async

JOB = Job(id="job", prompt="x", sampling=SamplingParams(max_tokens=4))
FOR_OTHER = JOB.model_copy(update={"id": "named", "model": "other"})


async def make_half(worker: Queue) -> None:
    """The one job that waits gets a token from this worker, which hands it over."""
    (entry,) = await worker.take(1)
    begun = await worker.begin(entry, JOB.id, None)
    assert await worker.append([Append(JOB.id, begun.attempt, TokensEvent(1, [7], "a"), publish=False)]) == [
        1
    ]
    assert await worker.release(entry, JOB.id, begun.attempt)


# The scripts


async def test_what_another_model_began_is_not_resumed_but_parked(make_queue, push):
    first, second = make_queue("first", OTHER), make_queue("second", TINY)
    await push(JOB)
    await make_half(first)
    (entry,) = await second.claim_idle(3600, 10)
    begun = await second.begin(entry, JOB.id, None)
    assert (begun.verdict, begun.fingerprint) == ("other_model", OTHER.fingerprint)
    assert await second.park(entry, JOB.id, begun.fingerprint)

    assert await second.claim_idle(0, 10) == []
    assert await second.take(10) == [], "parked for others"
    first.look_for_parked()
    (entry,) = await first.take(10)
    begun = await first.begin(entry, JOB.id, None)
    assert (begun.verdict, begun.position, begun.deaths) == ("run", 1, 0)
    assert await first.committed(JOB.id) == [7]


async def test_parking_a_duplicate_entry_leaves_the_job_to_its_holder(client, keys, make_queue, push):
    first, second = make_queue("first", OTHER), make_queue("second", TINY)
    await push(JOB)
    await make_half(first)
    (entry,) = await first.claim_idle(3600, 10)
    assert (await first.begin(entry, JOB.id, None)).verdict == "run"
    await push(JOB)
    (duplicate,) = await second.take(1)
    assert await second.park(duplicate, JOB.id, "other")
    assert await client.hmget(keys.job(JOB.id), "status", "worker") == [b"running", b"first"]


async def test_with_nothing_committed_any_model_may_begin_anew(make_queue, push):
    first, second = make_queue("first", OTHER), make_queue("second", TINY)
    await push(JOB)
    (entry,) = await first.take(1)
    begun = await first.begin(entry, JOB.id, None)
    await first.release(entry, JOB.id, begun.attempt)
    (entry,) = await second.claim_idle(3600, 10)
    assert (await second.begin(entry, JOB.id, None)).verdict == "run"


async def test_a_job_that_names_a_model_of_others_is_parked_for_it(make_queue, push):
    other, tiny = make_queue("other", OTHER), make_queue("tiny", TINY)
    tiny.served_elsewhere = frozenset({"other"})
    await push(FOR_OTHER)
    (entry,) = await tiny.take(1)
    begun = await tiny.begin(entry, FOR_OTHER.id, None, model="other")
    assert (begun.verdict, begun.fingerprint) == ("other_model", "other")
    assert await tiny.park(entry, FOR_OTHER.id, "other")
    (entry,) = await other.take(1)
    assert (await other.begin(entry, FOR_OTHER.id, None, model="other")).verdict == "run"


async def test_what_is_committed_decides_and_not_the_name(make_queue, push):
    """The name has moved on to another model: its own worker must not be sent away by it, back and forth."""
    first, second = make_queue("first", OTHER), make_queue("second", TINY)
    first.served_elsewhere = frozenset({"prod"})
    await push(JOB.model_copy(update={"model": "prod"}))
    await make_half(first)
    (entry,) = await second.claim_idle(3600, 10)
    begun = await second.begin(entry, JOB.id, None, model="prod")
    assert (begun.verdict, begun.fingerprint) == ("other_model", OTHER.fingerprint)
    await second.park(entry, JOB.id, begun.fingerprint)
    first.look_for_parked()
    (entry,) = await first.take(10)
    assert (await first.begin(entry, JOB.id, None, model="prod")).verdict == "run"


async def test_a_death_is_counted_though_another_model_finds_it(client, keys, make_queue, push):
    first, second = make_queue("first", OTHER), make_queue("second", TINY)
    await push(JOB)
    (entry,) = await first.take(1)
    begun = await first.begin(entry, JOB.id, None)
    await first.append([Append(JOB.id, begun.attempt, TokensEvent(1, [7], "a"), publish=False)])
    (entry,) = await second.claim_idle(0, 10)
    assert (await second.begin(entry, JOB.id, None)).verdict == "other_model"
    assert await second.park(entry, JOB.id, OTHER.fingerprint)
    assert await second.park(entry, JOB.id, OTHER.fingerprint) is False, "it is not ours any more"
    assert await client.hmget(keys.job(JOB.id), "status", "deaths", "worker") == [b"queued", b"1", b""]


async def test_what_is_parked_is_anybodys_when_nobody_serves_its_model_any_more(make_queue, push):
    second = make_queue("second", TINY)
    await push(JOB)
    await make_half(make_queue("first", OTHER))
    (entry,) = await second.claim_idle(3600, 10)
    await second.park(entry, JOB.id, OTHER.fingerprint)

    assert await second.take(10) == [], "not before model_wait_s"
    second.served_elsewhere, second.model_wait_s = frozenset({OTHER.fingerprint}), 0.0
    second.look_for_parked()
    assert await second.take(10) == [], "a worker of it lives"
    second.served_elsewhere = frozenset()
    second.look_for_parked()
    (entry,) = await second.take(10)
    assert entry.abandoned
    for _ in ("begun", "begun again, since the reply was lost"):
        begun = await second.begin(entry, JOB.id, None)
        assert (begun.verdict, begun.fingerprint) == ("run", OTHER.fingerprint)


async def test_the_same_weights_in_other_numbers_go_on_and_the_record_says_so(client, keys, make_queue, push):
    second = make_queue("second", TINY)
    await push(JOB)
    await make_half(make_queue("first", TINY_IN_BFLOAT16))
    (entry,) = await second.claim_idle(3600, 10)
    await second.park(entry, JOB.id, TINY_IN_BFLOAT16.fingerprint)
    second.model_wait_s = 0.0
    second.look_for_parked()
    (entry,) = await second.take(10)
    begun = await second.begin(entry, JOB.id, None)
    assert (begun.verdict, begun.fingerprint) == ("run", TINY_IN_BFLOAT16.fingerprint)
    assert await client.hget(keys.job(JOB.id), "model") == TINY.fingerprint.encode()


async def test_a_generation_that_was_handed_over_goes_on_before_what_is_parked(make_queue, push):
    first, second = make_queue("first", OTHER), make_queue("second", TINY)
    await push(JOB)
    await make_half(first)
    for number in range(5):
        await push(FOR_OTHER.model_copy(update={"id": f"named-{number}"}))
    for entry in await second.take(5):
        assert await second.park(entry, "named", "other")
    first.look_for_parked()
    assert [entry.raw for entry in await first.claim_idle(3600, 1)] == [encode_job(JOB)]
    assert len(await first.take(3)) == 3
    assert len(await first.take(3)) == 2


async def test_no_more_is_taken_of_what_is_parked_than_there_is_room_for(make_queue, push):
    first, second = make_queue("first", OTHER), make_queue("second", TINY)
    for number in range(8):
        await push(FOR_OTHER.model_copy(update={"id": f"named-{number}"}))
    places = [OTHER.fingerprint, "other", "gone"]
    for number, entry in enumerate(await second.take(8)):
        await second.park(entry, "named", places[number % len(places)])
    first.model_wait_s = 0.0
    assert [len(await first.take(3)) for _ in range(4)] == [3, 3, 2, 0]


async def test_what_is_urgent_and_new_comes_before_what_is_parked_and_less_urgent(make_queue, push):
    first, second = make_queue("first", OTHER), make_queue("second", TINY)
    await push(FOR_OTHER, Priority.LOW)
    (entry,) = await second.take(1)
    await second.park(entry, FOR_OTHER.id, "other")
    await push(JOB, Priority.HIGH)
    assert [entry.priority for entry in await first.take(2)] == [Priority.HIGH, Priority.LOW]


async def test_a_cancelled_job_is_ended_by_a_worker_of_any_model(client, keys, make_queue, push):
    await push(JOB)
    await make_half(make_queue("first", OTHER))
    await client.hset(keys.job(JOB.id), "cancel", 1)
    second = make_queue("second", TINY)
    (entry,) = await second.claim_idle(3600, 10)
    begun = await second.begin(entry, JOB.id, None)
    assert (begun.verdict, begun.cancelled) == ("run", True)


# Workers


async def test_a_worker_of_another_model_refuses_to_start(harness):
    await harness(model=TINY)
    second = await harness(model=OTHER)
    with pytest.raises(ConfigError, match=r"another model \(0123.* at w0-.*this worker has.*INGINE_QUEUE"):
        await second.running
    third = await harness(model=TINY_IN_BFLOAT16)
    with pytest.raises(ConfigError, match=r"0123456789abcdef:bfloat16"):
        await third.running
    fourth = await harness(model=TINY)
    await wait_until_async(lambda: fourth.worker._partitions[0].ready.is_set(), what="the fourth")
    names = [name_of(worker_id.decode()) for worker_id in await fourth.redis.hkeys(fourth.keys.workers)]
    assert sorted(names) == ["w0", "w3"]


async def test_of_two_that_start_at_the_same_moment_one_gives_way(harness):
    first, second = await asyncio.gather(
        harness(worker_id="a", model=TINY), harness(worker_id="b", model=OTHER)
    )
    running = {first.running, second.running}
    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
    (ended,) = (task for task in running if task.done())
    assert isinstance(ended.exception(), ConfigError)


async def test_the_worker_before_may_be_dead_or_of_an_older_version(harness):
    """Neither a heartbeat that has stopped nor one that tells no model keeps a worker from its queue."""
    first = await harness(model=TINY)
    workers = first.keys.workers
    await first.redis.hset(workers, "older", b"\x82\xa4at_s\xce\x7f\xff\xff\xff\xa5model\xa5older")
    await first.stop()
    second = await harness(model=OTHER)
    await second.push(JOB)
    assert (await second.end(JOB.id)).status is JobStatus.FINISHED
    assert await second.redis.hget(second.keys.settings, "model") == OTHER.fingerprint.encode()


async def test_a_model_that_somebody_goes_on_writing_ends_the_start(make_queue, client, monkeypatch):
    """Each is replaced once, since no worker has it; then another one is there."""
    queue, live_worker_of, num_asked = make_queue("w"), ingine.worker.startup._live_worker_of, 0

    async def written_meanwhile(redis, keys, fingerprint):
        nonlocal num_asked
        num_asked += 1
        assert num_asked < 1000, "it would go on for ever"
        await redis.hset(keys.settings, "model", f"forged-{num_asked}")
        return await live_worker_of(redis, keys, fingerprint)

    monkeypatch.setattr(ingine.worker.startup, "_live_worker_of", written_meanwhile)
    await client.hset(queue.keys.settings, "model", "forged-0")
    heartbeat = SimpleNamespace(beat=AsyncMock(), leave=AsyncMock())
    with pytest.raises(ConfigError, match=r"a client keeps writing models.* `model` of .*forged-\d+"):
        await ingine.worker.startup.enter(client, queue, heartbeat, WorkerSettings(_env_file=None))
    heartbeat.leave.assert_awaited_once()


async def num_parked(harness, model: str) -> int:
    consumers = await harness.redis.xinfo_consumers(harness.keys.jobs("normal"), GROUP)
    return sum(each["pending"] for each in consumers if each["name"].decode() == parked(model))


async def serve_after_another(harness):
    """A worker that knows of another model, whose worker has just left."""
    other = await harness(model=OTHER)
    tiny = await harness(model=TINY, mixed_models=True)
    await wait_until_async(lambda: "other" in tiny.queue.served_elsewhere, what="what the other serves")
    await other.stop()
    return tiny


async def test_jobs_that_name_a_model_are_left_to_the_worker_that_serves_it(harness, redis_url, queue):
    """More of them than a worker has room for. Nobody counts them as running meanwhile."""
    tiny = await serve_after_another(harness)
    jobs = [FOR_OTHER.model_copy(update={"id": f"named-{n}"}) for n in range(20)]
    for job in jobs:
        await tiny.push(job)

    async def all_are_parked() -> bool:
        return await num_parked(tiny, "other") == len(jobs)

    await wait_until_async(all_are_parked, what="all of them parked")
    async with AsyncClient(redis_url, queue=queue) as client:
        info = await client.queue_info()
    assert (info.waiting["normal"], info.running["normal"]) == (len(jobs), 0)

    other = await harness(model=OTHER, mixed_models=True)
    for job in jobs:
        assert (await other.end(job.id)).status is JobStatus.FINISHED
        assert await tiny.redis.hget(tiny.keys.job(job.id), "model") == OTHER.fingerprint.encode()


async def test_a_job_that_names_a_model_nobody_serves_fails_at_once(harness):
    tiny = await harness(model=TINY, mixed_models=True)
    await tiny.push(Job(id="typo", prompt="x", model="tyni"))
    end = await tiny.end("typo")
    assert end.error["code"] == ErrorCode.UNKNOWN_MODEL
    assert "tiny" in end.error["message"]


async def test_a_job_waits_for_its_model_and_then_fails(harness):
    tiny = await serve_after_another(harness)
    await tiny.push(FOR_OTHER)
    await wait_until_async(lambda: num_parked(tiny, "other"), what="the job to be parked")
    tiny.queue.model_wait_s = 1.0
    end = await tiny.end(FOR_OTHER.id)
    assert end.error["code"] == ErrorCode.UNKNOWN_MODEL


@pytest.fixture
async def queue_of(redis_url, keys: Keys) -> AsyncIterator[Callable[[ServedModel], Awaitable[Queue]]]:
    """The queue on the real server as a worker of this model sees it."""
    async with redis.asyncio.from_url(redis_url, protocol=2) as client:

        async def make(model: ServedModel) -> Queue:
            worker = Queue(keys, "old", client, model, result_ttl_s=60, max_deaths=3, model_wait_s=60)
            await worker.create_groups()
            return worker

        yield make


async def test_a_log_is_never_continued_by_another_model(harness, queue_of, redis_url, keys):
    async with AsyncClient(redis_url, queue=keys.queue) as client:
        await client.submit_many([JOB])
    await make_half(await queue_of(OTHER))
    new = await harness(model=TINY, mixed_models=True)
    await wait_until_async(lambda: num_parked(new, OTHER.fingerprint), what="the job to be parked")
    new.queue.model_wait_s = 1.0
    end = await new.end(JOB.id)
    assert (end.status, end.error["code"], end.position) == (JobStatus.FAILED, ErrorCode.MODEL_CHANGED, 1)
    assert OTHER.fingerprint in end.error["message"]
    assert await new.redis.xpending_range(new.keys.jobs("normal"), GROUP, "-", "+", 1) == []


async def test_nobody_is_taken_for_gone_by_a_worker_that_could_not_have_seen_it(harness):
    """After an outage of the server, or on a new one, whoever comes first must not judge the others."""
    tiny = await harness(model=TINY, mixed_models=True)
    long_ago = int((await tiny.redis.time())[0]) - 3000
    await tiny.redis.hset(tiny.keys.models, "other", long_ago)
    await wait_until_async(lambda: "other" in tiny.queue.served_elsewhere, what="the other's name")
    await tiny.push(FOR_OTHER)
    await wait_until_async(lambda: num_parked(tiny, "other"), what="the job to be parked")


async def test_a_time_that_is_none_is_no_sign_of_life(harness):
    tiny = await harness(model=TINY, mixed_models=True)
    times = {"a": "inf", "b": "nan", "c": "x", "d": 1 << 40, "e": -1}
    await tiny.redis.hset(tiny.keys.models, mapping=times)
    for model in times:
        await tiny.push(Job(id=f"for-{model}", prompt="x", model=model))
        assert (await tiny.end(f"for-{model}")).error["code"] == ErrorCode.UNKNOWN_MODEL


def test_a_worker_knows_its_model_by_content_numbers_and_sampling_defaults(tmp_path):
    folders = [tmp_path / "a", tmp_path / "b"]
    for seed, folder in enumerate(folders):
        make_tiny_model(folder, seed=seed)

    def served(folder, **options) -> ServedModel:
        options = {"device": "cpu", "kv_cache_bytes": 8 << 20, "dtype": "float32"} | options
        engine, model = build_engine(WorkerSettings(_env_file=None, model=str(folder), **options))
        engine.close()
        return model

    first, second = map(served, folders)
    assert first.fingerprint == f"{model_fingerprint(folders[0])}:float32"
    assert not first.same_weights(second.fingerprint)
    for options in ({"dtype": "bfloat16"}, {"generation_config": "vllm"}):
        other = served(folders[0], **options)
        assert other.fingerprint != first.fingerprint
        assert first.same_weights(other.fingerprint)
