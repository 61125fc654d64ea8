"""A server that loses the same thing again and again: the client tries anew, but not for ever."""

import asyncio
from collections.abc import AsyncIterator

import pytest

from producer import AsyncClient, BadRecord
from producer.handle import MAX_READS
from producer.streams import LogWentBack, Streams
from tests.waiting import HANGS_S


@pytest.fixture
def goes_back(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Each log that is read for a result goes back, for ever. The deadlines of the reads."""
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
