"""/metrics, /healthz and /readyz of a running worker, as Prometheus and an orchestrator see them."""

import asyncio
import time
import urllib.error
import urllib.request

import pytest
import redis.exceptions

import ingine.worker.worker
from ingine.contract.jobs import Job
from ingine.contract.keys import Priority
from ingine.errors import ConfigError
from ingine.worker.embedded import EmbeddedServer
from ingine.worker.hosting.engine_thread import EngineThread
from ingine.worker.http import HttpServer
from ingine.worker.settings import WorkerSettings
from ingine.worker.worker import Worker
from tests.served_models import TINY
from tests.waiting import HANGS_S, wait_until_async
from tests.worker.test_worker import GREEDY


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


async def test_metrics_count_what_happened(harness, step_by_step):
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


async def readyz(worker) -> tuple[int, str]:
    return await get(worker, "/readyz")


async def test_a_worker_is_ready_while_it_serves(harness, monkeypatch):
    go_on = asyncio.Event()
    prepare = ingine.worker.worker.prepare

    async def prepare_later(*args):
        await go_on.wait()
        await prepare(*args)

    monkeypatch.setattr(ingine.worker.worker, "prepare", prepare_later)
    here = await harness(http_port=0)
    assert await readyz(here) == (503, "waiting for Redis: it has not answered yet\n")
    assert await get(here, "/healthz") == (200, "ok\n"), "it lives"
    assert (await get(here, "/nothing"))[0] == 404
    go_on.set()

    async def says(status: int, body: str) -> None:
        async def does() -> bool:
            return await readyz(here) == (status, f"{body}\n")

        await wait_until_async(does, what=body)

    await says(200, "ok")
    await here.redis.hset(here.keys.settings, "paused", 1)
    await says(503, "the worker is paused")
    assert await get(here, "/healthz") == (200, "ok\n"), "a paused worker is alive"
    await here.redis.hdel(here.keys.settings, "paused")
    await says(200, "ok")

    async def not_yet(*_, **__):
        await go_on.wait()

    go_on.clear()
    monkeypatch.setattr(here.worker._hand_over, "run", not_yet)
    here.worker.stop()
    await says(503, "the worker is draining")
    assert await get(here, "/healthz") == (200, "ok\n")
    go_on.set()


async def test_a_prompt_that_takes_long_to_read_makes_no_worker_unhealthy(harness, monkeypatch):
    """The intake waits for it; Redis goes on answering heartbeats."""
    here = await harness(http_port=0)
    reading, go_on = asyncio.Event(), asyncio.Event()
    prompts, heartbeat = here.worker.prompts, here.worker._partitions[0].heartbeat
    read = prompts.read

    async def read_slowly(*args):
        reading.set()
        await go_on.wait()
        return await read(*args)

    monkeypatch.setattr(prompts, "read", read_slowly)
    await here.push(Job(id="a", prompt="x", sampling=GREEDY))
    await reading.wait()
    begun = time.monotonic()
    await wait_until_async(lambda: heartbeat.last_answer > begun + 1, what="an answer to a later heartbeat")
    assert here.worker._health.unready() is None
    go_on.set()
    await here.end("a")


async def test_a_server_that_refuses_writes_is_no_reason_to_restart_a_worker(
    tiny_engine, queue, tmp_path, monkeypatch
):
    """The worker takes no jobs meanwhile, but stays alive."""
    monkeypatch.setattr("ingine.worker.health.READY_S", 0.1)
    with EmbeddedServer(tmp_path) as server, redis.Redis.from_url(server.url) as admin:
        settings = WorkerSettings(_env_file=None, queue=queue, http_port=-1)
        here = Worker(settings, server.url, EngineThread(tiny_engine), model=TINY)
        running, health = asyncio.create_task(here.run()), here._health
        await wait_until_async(lambda: here._partitions and health.unready() is None, what="the start")
        admin.config_set("min-replicas-to-write", 1)
        (partition,) = here._partitions
        await wait_until_async(lambda: partition.intake.failing_since, what="the first refusal")
        refused_at = partition.intake.failing_since
        answered = partition.heartbeat
        await wait_until_async(lambda: answered.last_answer > refused_at + 1, what="answers all the same")
        assert health.unhealthy() is None
        await wait_until_async(health.unready, what="not being ready")
        assert "jobs could not be taken" in health.unready()
        admin.config_set("min-replicas-to-write", 0)
        await wait_until_async(lambda: health.unready() is None, what="being ready again")
        here.stop()
        await running


async def test_a_server_that_takes_no_writes_makes_a_worker_unready(harness, monkeypatch):
    worker = await harness(http_port=0)
    monkeypatch.setattr("ingine.worker.health.READY_S", 0.1)

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

    async def unhealthy() -> bool:  # once the thread has gone, which tells before it does
        return await get(worker, "/healthz") == (503, "the engine is not running\n")

    await wait_until_async(unhealthy, what="the end of the engine's thread")


def test_a_port_that_is_taken_is_a_clear_error():
    def fine() -> None:
        return None

    first = HttpServer("127.0.0.1", 0, registry=None, healthy=fine, ready=fine)
    with pytest.raises(ConfigError, match=f"INGINE_HTTP_PORT.*{first.port}"):
        HttpServer("127.0.0.1", first.port, registry=None, healthy=fine, ready=fine)
    first.stop()
