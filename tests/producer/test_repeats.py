"""A server that loses the same data again and again: the client retries, but not for ever."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from redis.asyncio import Redis
from redis.asyncio.client import Pipeline
from redis.exceptions import NoScriptError

from ingine.connect.scripts import MAX_TRIPS
from ingine.contract.keys import Keys
from ingine.producer import AsyncClient, AsyncJobHandle, BadRecord, JobNotFound, ServerUnavailable
from ingine.producer.batch import MAX_LOST
from ingine.producer.handle import MAX_READS
from ingine.producer.streams import LogWentBack, Streams
from tests.producer.test_batch import Files, request, run
from tests.waiting import HANGS_S


@pytest.fixture
def goes_back(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Make each log that is read for a result go back, for ever. Yields the deadlines of the reads."""
    deadlines: list[float] = []

    async def follow(*_, **__) -> AsyncIterator:
        raise LogWentBack
        yield

    def timeout_at(deadline: float) -> asyncio.Timeout:
        deadlines.append(deadline)
        return asyncio.Timeout(deadline)

    monkeypatch.setattr(Streams, "follow", follow)
    monkeypatch.setattr(asyncio, "timeout_at", timeout_at)
    return deadlines


async def test_a_log_that_goes_back_again_and_again_is_an_error(client: AsyncClient, goes_back: list[float]):
    with pytest.raises(BadRecord, match="log of job odd went back 10 times"):
        await client.attach("odd").result()


async def test_a_timeout_is_that_of_all_reads_together(client: AsyncClient, goes_back: list[float]):
    with pytest.raises(BadRecord):
        await client.attach("odd").result(HANGS_S)
    assert len(goes_back) == MAX_READS
    assert len(set(goes_back)) == 1


async def test_a_script_that_is_lost_again_and_again_is_an_error(
    client: AsyncClient, monkeypatch: pytest.MonkeyPatch
):
    num_trips = 0

    async def execute(pipeline: Pipeline, *_, **__) -> list:
        nonlocal num_trips
        num_trips += 1
        return [NoScriptError("No matching script.")] * len(pipeline)

    monkeypatch.setattr(Pipeline, "execute", execute)
    with pytest.raises(ServerUnavailable, match="refuses the command: No matching script"):
        await client.submit_many([{"prompt": "one"}, {"prompt": "two"}])
    assert num_trips == MAX_TRIPS


async def test_a_batch_whose_results_are_lost_again_and_again_ends(
    client: AsyncClient, redis: Redis, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A worker ran each of the lost jobs."""

    async def result(handle: AsyncJobHandle) -> None:
        raise JobNotFound(handle.job_id)

    monkeypatch.setattr(AsyncJobHandle, "result", result)
    files = Files(tmp_path)
    files.write(request(1))
    with pytest.raises(JobNotFound, match="lost 10 jobs of the line 'line-001'"):
        await run(client, files)
    assert await redis.xlen(keys.jobs("low")) == MAX_LOST
    assert files.rows() == ([], [])
