"""Waiting for Redis: longer each time, with a line when it goes and one when it is back. Never in vain."""

import asyncio

import pytest
from redis.exceptions import ConnectionError, OutOfMemoryError, ResponseError

import ingine.worker.retry
from ingine.worker.retry import FIRST_DELAY_S, LAST_DELAY_S, Backoff, never_passes, until_served


@pytest.fixture
def slept(monkeypatch) -> list[float]:
    """Record the duration of each sleep, without jitter and without sleeping."""
    delays: list[float] = []

    async def sleep(seconds: float) -> None:
        delays.append(seconds)

    monkeypatch.setattr(ingine.worker.retry.asyncio, "sleep", sleep)
    monkeypatch.setattr(ingine.worker.retry.random, "uniform", lambda low, high: high)
    return delays


def events(caplog) -> list[tuple[str, str]]:
    return [(record.getMessage(), record.fields["what"]) for record in caplog.records]


async def test_delays_double_up_to_the_last_and_start_again_after_a_success(slept, caplog):
    backoff = Backoff("append")
    with caplog.at_level("INFO"):
        for _ in range(8):
            await backoff.sleep(ConnectionError("gone"))
        assert slept[:3] == [FIRST_DELAY_S, 2 * FIRST_DELAY_S, 4 * FIRST_DELAY_S]
        assert slept[-2:] == [LAST_DELAY_S] * 2 == [max(slept)] * 2
        backoff.reset()
        backoff.reset()
        await backoff.sleep(ConnectionError("gone"))
    assert slept[-1] == FIRST_DELAY_S
    gone, back = ("redis failed, retrying", "append"), ("redis is back", "append")
    assert events(caplog) == [gone, back, gone], "once an outage"


async def test_jitter_keeps_workers_from_coming_all_at_once(monkeypatch):
    bounds = []
    monkeypatch.setattr(ingine.worker.retry.random, "uniform", lambda *given: bounds.append(given) or 0.0)
    await Backoff("append").sleep(ConnectionError("gone"))
    assert bounds == [(0.5, 1.0)]


async def test_a_call_is_made_until_it_is_served(slept):
    errors = iter(
        [ConnectionError("gone"), OSError("no route"), OutOfMemoryError("full"), ResponseError("READONLY")]
    )

    async def call() -> str:
        if error := next(errors, None):
            raise error
        return "done"

    assert await until_served("append", call) == "done"
    assert len(slept) == 4


FOREIGN = [
    "WRONGTYPE Operation against a key holding the wrong kind of value",
    "ERR hash value is not an integer",
    "ERR The ID specified in XADD is equal or smaller than the target stream top item",
]


@pytest.mark.parametrize("message", FOREIGN)
async def test_what_somebody_has_put_under_a_job_s_keys_is_not_waited_for(slept, message):
    async def call() -> None:
        raise ResponseError(message)

    with pytest.raises(ResponseError):
        await until_served("finish", call)
    assert not slept


@pytest.mark.parametrize(
    "error", [ConnectionError(FOREIGN[0]), ResponseError("LOADING"), ResponseError("OOM")]
)
def test_everything_else_passes(error):
    assert not never_passes(error)


async def test_a_fault_of_ours_is_no_outage(slept):
    async def call() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await until_served("finish", call)
    assert not slept


async def test_a_wait_can_be_cancelled():
    async def gone() -> None:
        raise ConnectionError("gone")

    waiting = asyncio.create_task(until_served("start", gone))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
