"""The client's methods for operators: inspecting and controlling a queue, and its dead letters."""

import msgpack
import pytest
from redis.asyncio import Redis

from ingine.contract.keys import GROUP, Keys
from ingine.producer import ClientError, JobNotFound
from tests.producer.conftest import Face
from tests.producer.fake_worker import FakeWorker
from tests.waiting import HANGS_S


async def bury(redis: Redis, keys: Keys, raw: bytes, code: str = "unknown_field") -> str:
    """Write a dead letter, as `ingine/contract/scripts/bury.lua` does. Returns its entry id."""
    fields = {"job": raw, "code": code, "reason": "why", "stream": keys.jobs("low"), "entry": "17-0"}
    return (await redis.xadd(keys.dead, fields | {"deliveries": 1, "worker": "w1"})).decode()


async def test_an_unused_queue_is_empty_and_has_the_default_limits(face: Face, queue: str):
    info = await face("queue_info")
    assert info.queue == queue
    assert info.waiting == info.running == {"high": 0, "normal": 0, "low": 0}
    assert (info.max_jobs, info.max_job_bytes) == (100_000, 1 << 20)
    assert (info.paused, info.draining, info.workers, info.num_dead) == (False, [], {}, 0)


async def test_what_a_worker_has_is_running_and_what_it_handed_over_waits(
    face: Face, worker: FakeWorker, redis: Redis, keys: Keys
):
    for _ in range(3):
        await face("submit", "hi", priority="low")
    await worker.take()
    job = await worker.take()
    info = await face("queue_info")
    assert (info.waiting["low"], info.running["low"]) == (1, 2)
    entry = (await face("status", job.id)).entry
    await redis.xclaim(keys.jobs("low"), GROUP, "released", 0, [entry])
    info = await face("queue_info")
    assert (info.waiting["low"], info.running["low"]) == (2, 1)


async def test_only_workers_that_beat_are_serving(face: Face, redis: Redis, keys: Keys):
    now_s, _ = await redis.time()
    beats = {
        "alive": {"state": "serving", "at_s": now_s + 3600},  # far from silent, however slow the test is
        "leaving": {"state": "draining", "at_s": now_s + 3600},
        "silent": {"state": "serving", "at_s": now_s - 7},
        "lost": {"state": "serving", "at_s": now_s - 100},
    }
    await redis.hset(keys.workers, mapping={name: msgpack.packb(beat) for name, beat in beats.items()})
    info = await face("queue_info")
    states = {name: worker["state"] for name, worker in info.workers.items()}
    assert states.pop("silent") in ("silent", "lost")
    assert states == {"alive": "serving", "leaving": "draining", "lost": "lost"}
    assert info.workers["lost"]["silent_s"] >= 100
    assert info.num_serving == 1


async def test_pause_and_resume_set_a_switch_and_nudge(face: Face, redis: Redis, keys: Keys):
    async with redis.pubsub() as pubsub:
        await pubsub.ssubscribe(keys.control)
        await pubsub.get_message(timeout=HANGS_S)
        await face("pause")
        assert (await face("queue_info")).paused
        assert msgpack.unpackb((await pubsub.get_message(timeout=HANGS_S))["data"]) == {"command": "pause"}
        await face("resume")
        assert not (await face("queue_info")).paused
        assert msgpack.unpackb((await pubsub.get_message(timeout=HANGS_S))["data"]) == {"command": "resume"}


async def test_drain_wants_a_worker_that_is_there(face: Face, redis: Redis, keys: Keys):
    await redis.hset(keys.workers, "w1", msgpack.packb({"at_s": 0}))
    await face("drain", "w1")
    assert await redis.hget(keys.settings, "drain:w1") == b"1"
    assert (await face("queue_info")).draining == ["w1"]
    with pytest.raises(ClientError, match=r"no worker 'w2'.*there are: w1"):
        await face("drain", "w2")


async def test_limits_are_kept_one_by_one(face: Face):
    await face("set_limits", max_jobs=5)
    await face("set_limits", max_job_bytes=777)
    info = await face("queue_info")
    assert (info.max_jobs, info.max_job_bytes) == (5, 777)
    with pytest.raises(ValueError, match="max_jobs is at least 1"):
        await face("set_limits", max_jobs=0)


async def test_a_dead_letter_can_be_looked_at(face: Face, redis: Redis, keys: Keys):
    raw = msgpack.packb({"id": "mine", "colour": "red"})
    entry_id = await bury(redis, keys, raw)
    await bury(redis, keys, b"\xc1", code="not_msgpack")
    first, second = await face("dead_letters")
    assert first == await face("dead_letter", entry_id)
    assert (first.job, first.job_id, first.code, first.reason) == (raw, "mine", "unknown_field", "why")
    assert (first.stream, first.entry, first.deliveries, first.worker) == (keys.jobs("low"), "17-0", 1, "w1")
    assert (second.job, second.job_id) == (b"\xc1", None)
    assert await face("dead_letters", 1) == [first]
    assert (await face("queue_info")).num_dead == 2
    with pytest.raises(ClientError, match="no dead letter '1-1'"):
        await face("dead_letter", "1-1")


@pytest.mark.parametrize("raw", [b"\x90", b"\xc1", b"", *map(msgpack.packb, ({"at_s": "x"}, {"a": 1}))])
async def test_what_is_no_heartbeat_is_shown_as_long_silent(face: Face, redis: Redis, keys: Keys, raw: bytes):
    await redis.hset(keys.workers, b"w\xff", raw)
    await redis.hset(keys.settings, mapping={b"\xff": b"\xff", b"weight:\xff": 2})
    info = await face("queue_info")
    assert list(info.workers) == ["w\ufffd"]
    assert info.workers["w\ufffd"]["silent_s"] > 1e9
    assert info.weights == {"\ufffd": 2}


async def test_what_is_no_dead_letter_can_be_looked_at_and_purged(face: Face, redis: Redis, keys: Keys):
    await redis.xadd(keys.dead, {b"\xff": b"\xff", b"deliveries": b"many"})
    [letter] = await face("dead_letters")
    assert (letter.job, letter.job_id, letter.code, letter.deliveries) == (b"", None, "", 0)
    assert await face("dead_letter", letter.entry_id) == letter
    with pytest.raises(ClientError, match="no jobs stream"):
        await face("requeue", letter.entry_id)
    assert await face("purge", [letter.entry_id]) == 1


@pytest.mark.parametrize("raw", [msgpack.packb({"id": "mine"}), b"\xc1"])
async def test_requeue_puts_it_back_where_it_came_from(face: Face, redis: Redis, keys: Keys, raw: bytes):
    entry_id = await bury(redis, keys, raw)
    entry = await face("requeue", entry_id)
    assert await redis.xrange(keys.jobs("low")) == [(entry.encode(), {b"job": raw})]
    assert await face("dead_letters") == []
    with pytest.raises(ClientError, match="no dead letter"):
        await face("requeue", entry_id)


async def test_a_dead_letter_whose_job_id_is_known_cannot_run_again(face: Face, redis: Redis, keys: Keys):
    await face("submit", "hi", job_id="mine")
    entry_id = await bury(redis, keys, msgpack.packb({"id": "mine", "prompt": "hi again"}))
    with pytest.raises(ClientError, match=r"mine .*known and queued.*under another id"):
        await face("requeue", entry_id)
    assert await redis.xlen(keys.jobs("low")) == 0
    assert len(await face("dead_letters")) == 1


async def test_purge_deletes_some_or_all(face: Face, redis: Redis, keys: Keys):
    entry_ids = [await bury(redis, keys, b"x") for _ in range(4)]
    assert await face("purge", []) == 0
    assert await face("purge", entry_ids[:1]) == 1
    assert await face("purge") == 3
    assert await face("dead_letters") == []


async def test_a_job_from_a_bare_xadd_is_unknown_until_it_has_begun(
    face: Face, worker: FakeWorker, redis: Redis, keys: Keys
):
    await redis.xadd(keys.jobs("normal"), {"job": msgpack.packb({"v": 1, "id": "bare", "prompt": "hi"})})
    with pytest.raises(JobNotFound):
        await face("cancel", "bare")
    await worker.take()
    assert await face("cancel", "bare") == "requested"
