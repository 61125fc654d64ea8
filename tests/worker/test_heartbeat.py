"""Values that a heartbeat writes, and its handling of values that any client may have written."""

import asyncio

import msgpack
import pytest

from ingine.contract.jobs import Job
from ingine.contract.keys import Keys
from ingine.sampling_params import SamplingParams
from ingine.worker.heartbeat import Heartbeat
from ingine.worker.metrics import Metrics
from ingine.worker.partition import _number
from tests.served_models import TINY
from tests.waiting import wait_until_async


@pytest.fixture
def make(client, keys):
    def make(**options) -> Heartbeat:
        nothing = {"learn": lambda given: None, "learn_models": lambda given: None}
        defaults = {"num_partitions": 1, "describe": dict, **nothing}
        return Heartbeat(client, keys, "w1", TINY, Metrics(), **defaults | options)

    return make


async def test_a_queue_that_nobody_serves_any_more_forgets_its_workers(make, client, keys: Keys):
    await make().beat()
    assert 0 < await client.ttl(keys.workers) <= 24 * 3600


async def test_a_nudge_is_one_beat_more(make, client, keys: Keys, monkeypatch):
    monkeypatch.setattr("ingine.worker.heartbeat.INTERVAL_S", 3600)
    monkeypatch.setattr("ingine.worker.heartbeat.FORGET_EVERY", 3600)
    learned = []
    heartbeat = make(learn=learned.append)
    running = asyncio.create_task(heartbeat.run())
    try:
        await wait_until_async(lambda: len(learned) == 1, what="the first beat")
        heartbeat.beat_early()
        await wait_until_async(lambda: len(learned) == 2, what="an early one")
        for _ in range(20):
            await client.exists(keys.workers)
        assert len(learned) == 2
    finally:
        running.cancel()


@pytest.mark.parametrize("text", ["nan", "-1", "0", "inf", "x", "", None])
def test_what_is_no_positive_number_counts_as_not_set(text):
    assert (_number(text, 1.0), _number("2.5", 1.0)) == (1.0, 2.5)


async def test_a_beat_has_totals_from_which_a_reader_can_compute_rates(harness):
    worker = await harness()
    for job_id in ("a", "b"):
        sampling = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
        await worker.push(Job(id=job_id, prompt="Once", sampling=sampling))
        await worker.end(job_id)

    async def totals() -> tuple[int, ...]:
        (beat,) = await worker.redis.hvals(worker.keys.workers)
        beat = msgpack.unpackb(beat)
        return tuple(beat[name] for name in ("num_output_tokens", "num_ended"))

    async def has_counted() -> bool:
        return await totals() == (10, 2)

    await wait_until_async(has_counted, what="a beat after the jobs")
    (beat,) = await worker.redis.hvals(worker.keys.workers)
    assert msgpack.unpackb(beat)["num_prompt_tokens"] > 0
