"""A client on a server that lacks a command, or has renamed it: the first call names it. On real servers."""

import pytest
from redis.asyncio import Redis

from ingine.contract.keys import Keys
from ingine.errors import ServerUnavailable
from ingine.producer import AsyncClient
from tests.producer.fake_worker import FakeWorker
from tests.servers import Valkey
from tests.waiting import wait_until_async


@pytest.mark.parametrize("command", ["EVALSHA", "SCRIPT", "HGET", "XADD", "TIME"])
async def test_submitting_names_the_command(tmp_path, queue, command):
    """A script calls XADD and TIME, and the server's error names the line, not the command."""
    with Valkey(tmp_path, config=f'rename-command {command} ""') as server:
        async with AsyncClient(f"redis://{server.address}", queue=queue) as client:
            with pytest.raises(ServerUnavailable, match=rf"lacks a command.*\b{command}\b.*Redis 7 or later"):
                await client.submit("hi")


async def test_a_right_that_is_lacking_in_a_script_is_named(redis_server, queue):
    async with Redis.from_url(redis_server.url) as admin:
        await admin.execute_command("ACL", "SETUSER", queue, "on", ">pw", "~*", "&*", "+@all", "-xadd")
        url = redis_server.url.replace("//", f"//{queue}:pw@")
        try:
            async with AsyncClient(url, queue=queue) as client:
                with pytest.raises(ServerUnavailable, match=r"(?i)xadd"):
                    await client.submit("hi")
        finally:
            await admin.acl_deluser(queue)


async def test_streaming_names_the_command(tmp_path, queue):
    with Valkey(tmp_path, config='rename-command XREAD ""') as server:
        async with AsyncClient(f"redis://{server.address}", queue=queue) as client:
            with pytest.raises(ServerUnavailable, match=r"lacks a command.*XREAD"):
                await client.attach("x").result()


async def test_without_ssubscribe_a_stream_follows_the_log_and_does_not_ask_again(
    tmp_path, queue, monkeypatch, caplog
):
    monkeypatch.setattr("ingine.producer.streams.SILENCE_S", 0.05)
    with Valkey(tmp_path, config='rename-command SSUBSCRIBE ""') as server:
        url = f"redis://{server.address}"
        async with AsyncClient(url, queue=queue) as client, Redis.from_url(url) as redis:
            worker, handle = FakeWorker(redis, Keys(queue)), await client.submit("hi")
            await worker.take()
            stream = handle.stream()
            await worker.commit(handle.job_id, 0, 1)
            assert (await anext(stream)).position == 1
            [(hub, _)] = client._session.streams._readers.values()
            await wait_until_async(lambda: hub._runner.done(), what="the end of asking")
            await worker.run_from(handle.job_id, 1, 2)
            assert [chunk.position async for chunk in stream] == [2]
            assert (await client.attach(handle.job_id).result()).token_ids == [1, 2]
    [warning] = [record for record in caplog.records if "no live events" in record.message]
    assert "SSUBSCRIBE" in warning.message
