"""A server that is away in the middle of a stream."""

import asyncio
from collections.abc import AsyncIterator

import httpx2
import pytest
from redis.asyncio import Redis

from ingine.contract.jobs import Job
from ingine.gateway.settings import GatewaySettings
from ingine.producer import token_log
from tests.gateway.conftest import serving_worker
from tests.gateway.serving import serving
from tests.gateway.test_completions import ASKED, CHAT, chunks_in
from tests.producer.fake_worker import FakeWorker
from tests.servers import Valkey

ASKED_STREAM = ASKED | {"stream": True}


@pytest.fixture
def server(tmp_path):
    with Valkey(tmp_path, appendonly="yes", appendfsync="always") as server:
        yield server


@pytest.fixture
def outage_settings(server, queue) -> GatewaySettings:
    return GatewaySettings(redis_url=f"redis://{server.address}/0", queue=queue, gateway_ping_s=0.05)


async def job_with_a_token(worker: FakeWorker, parts: AsyncIterator[str]) -> tuple[Job, str]:
    """Take the job of a stream and commit its first token. Returns it, and the text up to there."""
    text, job = "", await worker.take()
    await worker.commit(job.id, 0, 1)
    while "<1>" not in text:
        text += await anext(parts)
    return job, text


async def test_a_stream_waits_with_pings_and_goes_on(server, outage_settings, keys):
    async with serving(outage_settings) as http, Redis.from_url(outage_settings.redis_url) as redis:
        worker = await serving_worker(redis, keys)
        async with http.stream("POST", CHAT, json=ASKED_STREAM) as response:
            parts = response.aiter_text()
            job, text = await job_with_a_token(worker, parts)
            await asyncio.to_thread(server.kill)
            num_pings = text.count(": ping")
            while text.count(": ping") < num_pings + 3:
                text += await anext(parts)
            await asyncio.to_thread(server.start)
            await redis.connection_pool.disconnect()  # the test's own
            await worker.run_from(job.id, 1, 3)
            async for part in parts:
                text += part
    deltas = [chunk["choices"][0]["delta"].get("content") for chunk in chunks_in(text)]
    assert deltas == ["", "<1>", "<2>", "<3>", None]


async def test_a_stream_is_cut_off_if_the_server_stays_away(server, outage_settings, keys, monkeypatch):
    monkeypatch.setattr(token_log, "GIVE_UP_S", 0.2)
    async with serving(outage_settings) as http, Redis.from_url(outage_settings.redis_url) as redis:
        worker = await serving_worker(redis, keys)
        async with http.stream("POST", CHAT, json=ASKED_STREAM) as response:
            parts = response.aiter_text()
            _, text = await job_with_a_token(worker, parts)
            await asyncio.to_thread(server.kill)
            with pytest.raises(httpx2.RemoteProtocolError):
                async for part in parts:
                    text += part
    assert "[DONE]" not in text and '"finish_reason":"' not in text
    assert '"code":"server_unavailable"' in text
