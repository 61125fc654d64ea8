"""Fixtures of the gateway: its settings, a gateway in this process, and a worker that the test drives."""

from collections.abc import AsyncIterator

import httpx2
import msgpack
import pytest
from redis.asyncio import Redis

from ingine.contract.keys import Keys
from ingine.gateway.settings import GatewaySettings
from tests.gateway.serving import serving
from tests.producer.fake_worker import FakeWorker


@pytest.fixture
def settings(redis_url: str, queue: str) -> GatewaySettings:
    return GatewaySettings(redis_url=redis_url, queue=queue)


@pytest.fixture
async def http(settings: GatewaySettings) -> AsyncIterator[httpx2.AsyncClient]:
    async with serving(settings) as client:
        yield client


@pytest.fixture
def keys(queue: str) -> Keys:
    return Keys(queue)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as connection:
        yield connection


async def serving_worker(redis: Redis, keys: Keys) -> FakeWorker:
    """Return a worker that the test drives. To gateways it serves the model `tiny`."""
    heartbeat = {"at_s": 2**40, "state": "serving", "model": "tiny"}
    await redis.hset(keys.workers, "fake", msgpack.packb(heartbeat))
    return FakeWorker(redis, keys)


@pytest.fixture
async def worker(redis: Redis, keys: Keys) -> FakeWorker:
    return await serving_worker(redis, keys)
