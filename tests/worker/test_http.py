"""/metrics, /healthz and /readyz of a running worker, as Prometheus and an orchestrator see them."""

import asyncio
import urllib.error
import urllib.request

import pytest
import redis.exceptions

from ingine.errors import ConfigError
from ingine.keys import Priority
from ingine.wire import Job
from tests.waiting import HANGS_S, wait_until_async
from tests.worker.test_worker import GREEDY
from worker.http import HttpServer


async def get(harness, path: str) -> tuple[int, str]:
    return await asyncio.to_thread(_get, harness, path)


def _get(harness, path: str) -> tuple[int, str]:
    url = f"http://127.0.0.1:{harness.worker.http_port}{path}"
    try:
        with urllib.request.urlopen(url, timeout=HANGS_S) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def samples(text: str) -> dict[str, float]:
    lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, _, value in lines}


async def test_metrics_count_what_happened(harness):
    worker = await harness(http_port=0)
    await worker.push(Job(id="a", prompt="hello", sampling=GREEDY), Priority.HIGH)
    await worker.push(Job(id="b", prompt=""))
    await worker.push(b"junk")
    await worker.end("a")
    await worker.end("b")

    async def counted() -> dict[str, float]:
        values = samples((await get(worker, "/metrics"))[1])
        return values if values.get('ingine_dead_letters_depth{partition="0"}') else {}

    values = await wait_until_async(counted, what="a heartbeat after the dead letter")
    expected = {
        'ingine_jobs_total{status="finished"}': 1,
        'ingine_jobs_total{status="failed"}': 1,
        "ingine_prompt_tokens_total": 5,
        "ingine_output_tokens_total": 24,
        "ingine_first_token_seconds_count": 1,
        "ingine_between_tokens_seconds_count": 23,
        'ingine_queue_wait_seconds_count{priority="high"}': 1,
        "ingine_dead_letters_total": 1,
        "ingine_redeliveries_total": 0,
        "ingine_fenced_writes_total": 0,
        'ingine_queue_depth{partition="0",priority="normal"}': 0,
    }
    assert {name: values[name] for name in expected} == expected


async def test_a_worker_is_ready_when_it_serves(harness):
    worker = await harness(http_port=0)

    async def ready() -> bool:
        return await get(worker, "/readyz") == (200, "ok\n")

    await wait_until_async(ready, what="readiness")
    assert await get(worker, "/healthz") == (200, "ok\n")
    assert (await get(worker, "/nothing"))[0] == 404

    await worker.redis.hset(worker.keys.settings, "paused", 1)

    async def paused() -> bool:
        return await get(worker, "/readyz") == (503, "the worker is paused\n")

    await wait_until_async(paused, what="the pause")
    assert (await get(worker, "/healthz"))[0] == 200, "a paused worker is alive"


async def test_a_server_that_takes_no_writes_makes_a_worker_unready(harness, monkeypatch):
    worker = await harness(http_port=0)
    monkeypatch.setattr("worker.health.READY_COMMIT_S", 0.1)

    async def full(appends):
        raise redis.exceptions.ResponseError("OOM command not allowed when used memory > 'maxmemory'")

    with monkeypatch.context() as patch:
        patch.setattr(worker.queue, "append", full)
        await worker.push(Job(id="a", prompt="x", sampling=GREEDY))

        async def unready() -> bool:
            status, body = await get(worker, "/readyz")
            return status == 503 and "taken" in body

        await wait_until_async(unready, what="the complaint")
        assert (await get(worker, "/healthz"))[0] == 200
    assert (await worker.end("a")).position == 24, "nothing was lost"


async def test_a_dead_engine_is_unhealthy(harness):
    worker = await harness(http_port=0)

    await worker.push(Job(id="a", prompt="x", sampling=GREEDY))
    await worker.end("a")
    assert await get(worker, "/healthz") == (200, "ok\n")
    await worker.worker._engine.stop()
    assert await get(worker, "/healthz") == (503, "the engine is not running\n")


def test_a_port_that_is_taken_is_a_clear_error():
    def fine() -> None:
        return None

    first = HttpServer("127.0.0.1", 0, registry=None, healthy=fine, ready=fine)
    with pytest.raises(ConfigError, match=f"INGINE_HTTP_PORT.*{first.port}"):
        HttpServer("127.0.0.1", first.port, registry=None, healthy=fine, ready=fine)
    first._server.server_close()
