"""Values that a heartbeat writes, and its handling of values that any client may have written."""

import asyncio

import pytest

from ingine.contract.keys import Keys
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
