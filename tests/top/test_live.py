"""`ingine top` on a terminal, against a real server: keys do what they say, and an outage ends nothing."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import msgpack
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisError

from ingine.contract.keys import Keys
from ingine.producer import AsyncClient
from ingine.producer.home import end_tasks
from tests.producer.fake_worker import FakeWorker
from tests.servers import Valkey
from tests.top.screen import DECISIVE, Screen
from tests.waiting import HANGS_S, wait_until, wait_until_async


async def beat_always(redis: Redis, keys: Keys) -> None:
    """Send the heartbeats of a worker `fake`."""
    while True:
        with suppress(RedisError):
            now_s, _ = await redis.time()
            beat = {"name": "w", "state": "serving", "model": "tiny", "num_jobs": 2, "num_running": 2}
            beat |= {"kv_usage": 0.25, "num_output_tokens": 100 * now_s, "num_ended": now_s, "at_s": now_s}
            await redis.hset(keys.workers, "fake", msgpack.packb(beat))
        await asyncio.sleep(0.2)


@pytest.fixture
def keys(queue: str) -> Keys:
    return Keys(queue)


@pytest.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    async with Redis.from_url(redis_url) as redis:
        yield redis


@pytest.fixture
async def worker(redis: Redis, redis_url: str, keys: Keys, queue: str) -> AsyncIterator[FakeWorker]:
    """A worker that runs the jobs `a` and `b`, with 3 tokens each; job `c` waits."""
    beats = asyncio.create_task(beat_always(redis, keys))
    worker = FakeWorker(redis, keys)
    async with AsyncClient(redis_url, queue=queue) as client:
        for job_id in ("job-a", "job-b", "job-c"):
            await client.submit("a secret prompt", job_id=job_id, tenant="acme")
    for job_id in ("job-a", "job-b"):
        await worker.take()
        await worker.commit(job_id, 0, 3)
    yield worker
    await end_tasks([beats])


async def test_it_shows_the_queue_and_does_what_is_confirmed(worker, redis, keys, redis_url, queue):
    def control() -> None:
        with Screen("--redis-url", redis_url, "--queue", queue) as screen:
            screen.wait_for("> JOBS 2")
            screen.wait_for("  job-b ")
            screen.wait_for("100 tokens/s  1.0 jobs/s")
            assert screen.lines[0] == f"queue {queue}  serving 1 of 1 workers"
            assert screen.lines[4] == "high             0        0   acme                 1"
            assert screen.lines[5] == "normal           1        2"
            assert not screen._shows("<3>")
            screen.press("p")
            screen.wait_for("Pause the queue?")
            screen.press("n")
            screen.wait_without("Pause the queue?")
            screen.press("py")
            screen.wait_for("PAUSED")
            screen.press("ry")
            screen.wait_without("PAUSED")
            screen.press("\x1b[B\x1b[Bc")
            screen.wait_for("Cancel job job-b? (y/n)")
            screen.press("y")
            screen.wait_for("job job-b will be cancelled at its worker's next step")
            screen.press("\t\x1b[Bd")
            screen.wait_for("Drain worker fake?")
            screen.press("y")
            screen.wait_for("worker fake was asked to drain")
            screen.press("q")
            assert screen.end() == 0
            assert "secret" not in screen.written and "<3>" not in screen.written

    await asyncio.to_thread(control)
    assert await redis.hget(keys.job("job-b"), "cancel") == b"1"
    assert await redis.hget(keys.job("job-a"), "cancel") != b"1"
    settings = await redis.hgetall(keys.settings)
    assert settings.get(b"drain:fake") == b"1" and b"paused" not in settings


async def test_texts_grow_once_they_are_asked_for(worker, redis_url, queue):
    with Screen("--redis-url", redis_url, "--queue", queue) as screen:
        await asyncio.to_thread(screen.wait_for, "> JOBS 2")
        screen.press("t")
        await asyncio.to_thread(screen.wait_for, "    <1><2><3>")
        await worker.commit("job-a", 3, 5)
        await asyncio.to_thread(screen.wait_for, "    <1><2><3><4><5>")
        await worker.end("job-a", 5)
        await asyncio.to_thread(screen.wait_for, "> JOBS 1")
        screen.press("t")
        await asyncio.to_thread(screen.wait_without, "<3>")


async def test_a_terminal_of_another_size(worker, redis_url, queue):
    def resize() -> None:
        with Screen("--redis-url", redis_url, "--queue", queue) as screen:
            screen.wait_for("> JOBS 2")
            assert len(screen.lines) == 24
            for width, height in ((140, 50), (40, 10), (80, 24)):
                screen.resize(width, height)
                screen.program.send_signal(signal.SIGWINCH)
                wait_until(lambda: len(screen.lines) == height, what=f"{height} lines")  # noqa: B023
                assert max(map(len, screen.lines)) <= width

    await asyncio.to_thread(resize)


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 0), (signal.SIGHUP, 0), (signal.SIGINT, 130)]
)
async def test_a_signal_ends_it_and_the_terminal_is_restored(worker, redis_url, queue, number, status):
    def end() -> None:
        with Screen("--redis-url", redis_url, "--queue", queue) as screen:
            screen.wait_for("> JOBS 2")
            assert screen.end(number) == status
            assert "Traceback" not in screen.written

    await asyncio.to_thread(end)


async def test_the_server_is_killed_and_comes_back(tmp_path: Path):
    def kill() -> None:
        screen.wait_for("> JOBS 2")
        server.kill()
        screen.wait_for("no answer for")
        screen.wait_for("cannot be reached")
        assert screen._shows("  job-b ")
        screen.press("py")
        screen.wait_for("pause")
        server.start()
        screen.wait_without("no answer for")
        screen.wait_for("serving 1 of 1 workers")
        server.kill()
        screen.wait_for("no answer for")
        screen.press("q")
        assert screen.end() == 0

    with Valkey(tmp_path / "server", appendonly="yes", appendfsync="always") as server:
        url, keys = f"redis://{server.address}/0", Keys("mine")
        async with Redis.from_url(url) as redis, AsyncClient(url, queue="mine") as client:
            beats = asyncio.create_task(beat_always(redis, keys))
            worker = FakeWorker(redis, keys)
            for job_id in ("job-a", "job-b"):
                await client.submit("hi", job_id=job_id)
                await worker.take()
            await wait_until_async(lambda: redis.exists(keys.workers), what="a heartbeat")
            with Screen("--redis-url", url, "--queue", "mine") as screen:
                await asyncio.to_thread(kill)
            await end_tasks([beats])


def test_a_server_that_hangs_holds_up_no_key(tmp_path: Path):
    with Valkey(tmp_path / "server") as server:
        pid = int(server.admin.info("server")["process_id"])
        with Screen("--redis-url", f"redis://{server.address}/0") as screen:
            screen.wait_for("> JOBS 0")
            os.kill(pid, signal.SIGSTOP)
            try:
                screen.wait_for("no answer for")
                screen.press("p")
                screen.wait_for("Pause the queue?")
                screen.press("yq")
                assert screen.end() == 0
            finally:
                os.kill(pid, signal.SIGCONT)


def top(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ingine", "top", *arguments]
    known = {name: value for name, value in os.environ.items() if name not in DECISIVE}
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S, env=known | env)


async def test_without_a_terminal_it_prints_one_frame(worker, redis_url, queue):
    done = await asyncio.to_thread(top, "--redis-url", redis_url, "--queue", queue)
    assert done.returncode == 0 and not done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == f"queue {queue}  serving 1 of 1 workers"
    assert [line.split()[0] for line in lines[-2:]] == ["job-a", "job-b"]
    assert "\x1b" not in done.stdout and "q quit" not in done.stdout
    coloured = await asyncio.to_thread(
        lambda: top("--redis-url", redis_url, "--queue", queue, FORCE_COLOR="1")
    )
    assert "job-a" in coloured.stdout and "q quit" not in coloured.stdout


async def test_one_frame_on_a_terminal(worker, redis_url, queue):
    def once(**env: str) -> str:
        with Screen("--once", "--redis-url", redis_url, "--queue", queue, **env) as screen:
            assert screen.end() == 0
            return screen.written

    written = await asyncio.to_thread(once)
    assert "job-a" in written and "1049" not in written
    dumb = await asyncio.to_thread(lambda: once(TERM="dumb"))
    assert "job-a" in dumb and "\x1b" not in dumb


async def test_no_color(worker, redis_url, queue):
    def watch(**env: str) -> str:
        with Screen("--redis-url", redis_url, "--queue", queue, **env) as screen:
            screen.wait_for("> JOBS 2")
            screen.press("p")
            screen.wait_for("Pause the queue?")  # in yellow
            return screen.written

    assert "33mPause" in await asyncio.to_thread(watch)
    assert "33mPause" not in await asyncio.to_thread(lambda: watch(NO_COLOR="1"))


def test_one_frame_of_a_server_that_is_away():
    done = top("--once", "--redis-url", "redis://127.0.0.1:1/0")
    assert done.returncode == 3 and "cannot be reached" in done.stderr and "Traceback" not in done.stderr
