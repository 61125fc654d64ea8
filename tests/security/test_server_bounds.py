"""A script's use of a server, and its bounds: a user who may run scripts can stop the server for all.

docs/security.md says so, and how to separate users who must not be able to do that to each other.
"""

import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from redis import Redis
from redis.exceptions import RedisError, ResponseError

from ingine.contract.keys import Keys
from ingine.producer import AsyncClient
from tests.security.acl_server import AclServer
from tests.servers import server_binary
from tests.waiting import HANGS_S, wait_until

BINARIES = {server_binary()} | {Path(path) for path in [shutil.which("redis-server")] if path}
LOOP = "while true do end"
LOOP_AFTER_A_WRITE = "redis.call('XADD', KEYS[1], '*', 'a', 'b') while true do end"
ENDLESS = {"temperature": 0, "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(params=sorted(BINARIES), ids=lambda path: path.name)
def small_server(request, tmp_path) -> Iterator[AclServer]:
    with AclServer(tmp_path, binary=request.param, maxmemory="30mb") as server:
        yield server


def run_in_thread(server: AclServer, role: str, source: str, *keys: str) -> threading.Thread:
    """Start a thread that runs the script, and return it once the server is busy with the script."""

    def run() -> None:
        # The server may end the script, or exit.
        with Redis.from_url(server.url(role), retry=None) as redis, suppress(RedisError):
            redis.evalsha(redis.script_load(source), len(keys), *keys)

    thread = threading.Thread(target=run)
    thread.start()
    wait_until(lambda: is_busy(server), what="a server that is busy")
    return thread


def is_busy(server: AclServer) -> bool:
    try:
        return not server.admin.ping()
    except ResponseError as error:
        assert "BUSY" in str(error)
        return True


async def test_a_script_that_loops_stops_all_until_it_is_killed_and_then_all_goes_on(
    small_server, queue, run_worker
):
    await run_worker(small_server.url("worker"))
    async with AsyncClient(small_server.url("producer"), queue=queue) as client:
        job = await client.submit("x", **ENDLESS)
        await anext(job.stream())
        thread = run_in_thread(small_server, "operator", LOOP)
        small_server.admin.script_kill()
        thread.join()
        assert (await job.result()).usage["num_output_tokens"] == 400


def test_a_script_that_has_written_ends_with_the_server_only_and_leaves_nothing(small_server, queue):
    jobs = Keys(queue).jobs("normal")
    small_server.admin.xadd(jobs, {"job": "from before"})
    thread = run_in_thread(small_server, "submitter", LOOP_AFTER_A_WRITE, jobs)
    with pytest.raises(ResponseError, match="UNKILLABLE"):
        small_server.admin.script_kill()
    small_server.kill_and_start()
    thread.join()
    assert [fields for _, fields in small_server.admin.xrange(jobs)] == [{b"job": b"from before"}]


def test_maxmemory_does_not_bound_a_script(small_server, queue):
    jobs = Keys(queue).jobs("normal")
    fill = "local x = string.rep('x', 1e6) for _ = 1, 45 do redis.call('XADD', KEYS[1], '*', 'a', x) end"
    with Redis.from_url(small_server.url("submitter"), socket_timeout=HANGS_S) as redis:
        assert redis.evalsha(redis.script_load("return #string.rep('x', 5e7)"), 0) == 5e7
        redis.evalsha(redis.script_load(fill), 1, jobs)
        used = small_server.admin.info("memory")
        assert used["used_memory"] > 1.4 * used["maxmemory"] > 0
        with pytest.raises(RedisError, match=r"OOM|maxmemory"):
            redis.xadd(jobs, {"a": "b"})
        redis.evalsha(redis.script_load(f"#!lua flags=allow-oom\n{fill}"), 1, jobs)
        assert small_server.admin.info("memory")["used_memory"] > 2.8 * used["maxmemory"]


def test_who_asks_and_does_not_read_is_cut_off_before_memory_is_full(small_server, queue):
    tokens = Keys(queue).tokens("a")
    small_server.admin.xadd(tokens, {"event": b"x" * (1 << 20)})
    with Redis.from_url(small_server.url("consumer")) as redis:
        connection = redis.connection_pool.get_connection()
        connection._sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with suppress(OSError, RedisError):
            for _ in range(100):
                connection.send_command("XRANGE", tokens, "-", "+", check_health=False)
        wait_until(lambda: small_server.admin.info("stats")["evicted_clients"], what="its end")
        connection.disconnect()
    assert small_server.admin.xadd(tokens, {"event": b"more"})


def test_connections_without_a_password_use_up_the_servers_number_of_clients(small_server):
    small_server.admin.config_set("maxclients", 20)
    silent = [socket.create_connection(("127.0.0.1", small_server.port)) for _ in range(20)]
    try:
        with (
            Redis.from_url(small_server.url("observer"), retry=None) as redis,
            pytest.raises(RedisError, match="max number of clients"),
        ):
            redis.ping()
    finally:
        for connection in silent:
            connection.close()
