"""Gateways that are killed, and stopped, in the middle of a stream."""

import asyncio
from collections.abc import AsyncIterator

import httpx2
import pytest

from tests.gateway.processes import gateway_process
from tests.gateway.test_completions import ASKED, CHAT, chunks_in
from tests.gateway.test_errors import assert_error
from tests.waiting import HANGS_S

ASKED_STREAM = ASKED | {"stream": True}


async def read_until(end: str, parts: AsyncIterator[str]) -> str:
    """Read a stream until it has `end`."""
    text = ""
    while end not in text:
        text += await anext(parts)
    return text


async def test_a_stream_goes_on_at_another_gateway_after_kill_9(tmp_path, redis_url, queue, worker):
    with (
        gateway_process(tmp_path, redis_url, queue) as one,
        gateway_process(tmp_path, redis_url, queue) as other,
    ):
        async with httpx2.AsyncClient(timeout=HANGS_S) as http:
            with pytest.raises(httpx2.TransportError):
                async with http.stream("POST", one.url + CHAT, json=ASKED_STREAM) as response:
                    job = await worker.take()
                    await worker.commit(job.id, 0, 1)
                    await worker.commit(job.id, 1, 2)
                    parts = response.aiter_text()
                    text = await read_until(f"id: {job.id}/2-0\n", parts)
                    one.child.kill()
                    await read_until("never", parts)
            await worker.run_from(job.id, 2, 5)
            last = text.rpartition("id: ")[2].partition("\n")[0]
            rest = await http.post(other.url + CHAT, json=ASKED_STREAM, headers={"last-event-id": last})
    texts = [chunk["choices"][0]["delta"].get("content") for chunk in chunks_in(rest.text)]
    assert last == f"{job.id}/2-0" and texts == ["<3>", "<4>", "<5>", None]
    assert (await worker.redis.hget(worker.keys.job(job.id), "cancel")) in (None, b"0")


async def test_a_gateway_stops_at_a_signal_and_its_jobs_go_on(tmp_path, redis_url, queue, worker):
    with gateway_process(tmp_path, redis_url, queue) as gateway:
        async with httpx2.AsyncClient(timeout=HANGS_S) as http:
            with pytest.raises(httpx2.TransportError):
                async with http.stream("POST", gateway.url + CHAT, json=ASKED_STREAM) as response:
                    job = await worker.take()
                    await worker.commit(job.id, 0, 1)
                    parts = response.aiter_text()
                    await read_until(f"id: {job.id}/1-0\n", parts)
                    stopping = asyncio.get_running_loop().run_in_executor(None, gateway.child.terminate)
                    await read_until("never", parts)
            assert await stopping == 0
        assert "Traceback" not in gateway.log_text
    assert (await worker.redis.hget(worker.keys.job(job.id), "cancel")) in (None, b"0")


async def test_a_gateway_that_stops_tells_who_waits_for_a_whole_answer(tmp_path, redis_url, queue, worker):
    with gateway_process(tmp_path, redis_url, queue) as gateway:
        async with httpx2.AsyncClient(timeout=HANGS_S) as http:
            asking = asyncio.ensure_future(http.post(gateway.url + CHAT, json=ASKED))
            job = await worker.take()
            assert await asyncio.to_thread(gateway.child.terminate) == 0
            assert_error(await asking, 503, "shutting_down")
        assert "Traceback" not in gateway.log_text
    assert (await worker.redis.hget(worker.keys.job(job.id), "cancel")) in (None, b"0")


async def test_an_idle_gateway_stops_at_once(tmp_path, redis_url, queue):
    with gateway_process(tmp_path, redis_url, queue) as gateway:
        async with httpx2.AsyncClient(timeout=HANGS_S) as http:
            assert (await http.get(gateway.url + "/health")).status_code == 200
            assert await asyncio.to_thread(gateway.child.terminate) == 0
            with pytest.raises(httpx2.TransportError):
                await http.get(gateway.url + "/health")


async def test_a_client_that_reads_nothing_more_is_disconnected(tmp_path, redis_url, queue, worker):
    """Its socket's buffers are full, so the gateway waits, until the limit."""
    with gateway_process(tmp_path, redis_url, queue, send_timeout_s=0.2) as gateway:
        http = httpx2.AsyncClient(timeout=HANGS_S)
        async with http, http.stream("POST", gateway.url + CHAT, json=ASKED_STREAM):
            job, position, cancelled = await worker.take(), 0, None
            while not cancelled:
                await worker.commit(job.id, position, position + 10_000)
                position += 10_000
                cancelled = await worker.redis.hget(worker.keys.job(job.id), "cancel")
    assert cancelled == b"1"
