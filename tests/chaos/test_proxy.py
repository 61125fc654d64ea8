"""Each fault of the proxy has its effect, or chaos would prove nothing."""

from collections.abc import AsyncIterator

import pytest
from redis import exceptions
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from tests.chaos.proxy import FAULTS, HOST, ProxyProcess
from tests.servers import durable_server


@pytest.fixture
async def proxy() -> AsyncIterator[ProxyProcess]:
    proxy = await ProxyProcess().start()
    yield proxy
    await proxy.stop()


@pytest.fixture
async def client(proxy, redis_server) -> AsyncIterator[Redis]:
    """A client through the proxy, without retries."""
    port = await proxy.ask(listen=redis_server.port, seed="test")
    once = Retry(NoBackoff(), 0)
    client = Redis(host=HOST, port=port, single_connection_client=True, socket_timeout=1.0, retry=once)
    await client.ping()
    yield client
    await client.aclose()


async def hit(proxy: ProxyProcess, kind: str) -> int:
    return await proxy.ask(fault=kind, front=0, share=1.0, for_s=0.5)


@pytest.mark.parametrize(
    ("kind", "error", "is_executed"),
    [
        ("cut", exceptions.ConnectionError, False),
        ("drop_reply", exceptions.ConnectionError, True),
        ("half_close", exceptions.ConnectionError, None),
        ("stall", exceptions.TimeoutError, False),
    ],
)
async def test_faults_that_break_a_connection(proxy, client, queue, kind, error, is_executed):
    assert await hit(proxy, kind) == 1
    with pytest.raises(error):
        await client.incr(queue)
    executed = int(await client.get(queue) or 0)  # over a new connection
    assert is_executed is None or executed == is_executed


@pytest.mark.parametrize("kind", ["delay", "trickle"])
async def test_faults_that_only_slow_it_down(proxy, client, queue, kind):
    value = bytes(range(256)) * 40
    assert await hit(proxy, kind) == 1
    await client.set(queue, value)
    assert await client.get(queue) == value


async def test_a_fault_of_nobody_is_not_counted(proxy, redis_server):
    await proxy.ask(listen=redis_server.port, seed="test")
    assert [await hit(proxy, kind) for kind in FAULTS] == [0] * len(FAULTS)


async def test_it_can_be_pointed_at_another_server(proxy, client, queue, tmp_path):
    await client.set(queue, "here")
    with durable_server(tmp_path / "other") as other:
        await proxy.ask(point=other.port, front=0, cut=True)
        with pytest.raises(exceptions.ConnectionError):
            await client.get(queue)
        assert await client.get(queue) is None
