"""Servers that cannot serve a worker: each is named at its start, with what it lacks. On real servers."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager

import pytest
from redis import Redis

from ingine.connect.servers import Servers
from ingine.contract.keys import Keys
from ingine.errors import ConfigError
from ingine.worker.health import Health
from ingine.worker.hosting.engine_thread import EngineThread
from ingine.worker.server_check import check_server, names_of, needed_calls
from ingine.worker.settings import WorkerSettings
from ingine.worker.worker import Worker
from tests.security.acl_server import USERS_FILE
from tests.served_models import TINY
from tests.servers import HOST, Valkey, free_port
from tests.waiting import wait_until_async

OF_THE_HANDSHAKE = {"client|setname", "client|setinfo", "client|capa", "cluster|slots"}


async def check(url: str, queue: str) -> None:
    servers, keys = Servers(url, client_name="ingine-worker"), Keys(queue)
    try:
        await check_server(servers.client(keys), servers.where, keys)
    finally:
        await servers.aclose()


@contextmanager
def a_user(redis_url: str, name: str, *rules: str) -> Iterator[str]:
    """The URL of a user with these rights only."""
    with Redis.from_url(redis_url) as admin:
        admin.execute_command("ACL", "SETUSER", name, "reset", "on", ">pw", *rules)
        try:
            yield redis_url.replace("//", f"//{name}:pw@")
        finally:
            admin.acl_deluser(name)


RunWorker = Callable[[str], AbstractAsyncContextManager[tuple[Health, asyncio.Task]]]


@pytest.fixture
def run_worker(queue, tiny_engine) -> RunWorker:
    """A worker at a URL, until the end of the block: what /healthz and /readyz ask, and its task."""

    @asynccontextmanager
    async def run(url: str) -> AsyncIterator[tuple[Health, asyncio.Task]]:
        settings = WorkerSettings(_env_file=None, queue=queue, http_port=-1, worker_id="w")
        engine = tiny_engine()
        worker = Worker(settings, url, EngineThread(lambda: engine), model=TINY)
        running = asyncio.create_task(worker.run())
        try:
            yield worker._health, running
        finally:
            worker.stop()
            await asyncio.wait({running})
            worker._engine.close()

    return run


async def test_a_server_that_has_everything_passes(redis_url, queue):
    await check(redis_url, queue)


def test_what_is_asked_for_is_what_the_access_list_gives_a_worker(queue):
    (line,) = [line for line in USERS_FILE.read_text().splitlines() if "user ingine-worker " in line]
    given = set(re.findall(r" \+([^ )]+)", line)) - OF_THE_HANDSHAKE
    assert {name.lower().replace(" ", "|") for name in names_of(needed_calls(Keys(queue)))} == given


@pytest.mark.parametrize(
    "missing",
    [["EVALSHA"], ["SCRIPT"], ["SPUBLISH", "SSUBSCRIBE"], ["XCLAIM", "XREADGROUP", "HSETNX"]],
    ids=", ".join,
)
async def test_a_command_that_is_lacking_is_named_with_the_servers_version(tmp_path, queue, missing):
    """Redis 6 lacks commands, and so may a proxy, or a server whose administrator has renamed some."""
    config = "\n".join(f'rename-command {name} ""' for name in missing)
    with Valkey(tmp_path, config=config) as server:
        version = server.admin.execute_command("HELLO")["version"]
        with pytest.raises(ConfigError) as refused:
            await check(f"redis://{server.address}", queue)
    for name in missing:
        assert re.search(rf"{re.escape(version)} at {server.address} lacks .*\b{name}\b", str(refused.value))


async def test_a_command_that_the_user_may_not_run_is_named(redis_url, queue):
    for name in names_of(needed_calls(Keys(queue))):
        rule = "-" + name.lower().replace(" ", "|")
        named = pytest.raises(ConfigError, match=f"(?i){name.replace(' ', '.')}")
        with a_user(redis_url, "lacks-one", "~*", "&*", "+@all", rule) as url, named:
            await check(url, queue)


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        (("~ingine:*", "&other:*"), r"run SPUBLISH \(channel:0, control\), SSUBSCRIBE \(control\) on keys"),
        (("%R~ingine:*", "&*"), r"XADD \(tokens:0, jobs:normal, aside:0, replies:0, dead\)"),
        (("~ingine:{*}:queue", "&*"), r"XREADGROUP \(jobs:normal\)"),
    ],
)
async def test_keys_and_channels_that_the_user_may_not_touch(redis_url, queue, rules, named):
    with a_user(redis_url, "elsewhere", "+@all", *rules) as url, pytest.raises(ConfigError, match=named):
        await check(url, queue)


async def test_a_database_that_the_server_has_not(redis_url, queue):
    with pytest.raises(ConfigError, match="DB index is out of range"):
        await check(redis_url.removesuffix("0") + "99", queue)


async def test_a_url_of_the_wrong_kind_says_which_is_right(redis_url, tmp_path, queue):
    address = redis_url.removeprefix("redis://").removesuffix("/0")
    with pytest.raises(ConfigError, match="no cluster"):
        await check(f"redis+cluster://{address}", queue)
    with pytest.raises(ConfigError, match="no Sentinel"):
        await check(f"redis+sentinel://{address}/primary/0", queue)
    sentinel = Valkey(tmp_path, config=f"sentinel monitor primary {HOST} {free_port()} 1")
    try:
        sentinel.start("--sentinel")
        with pytest.raises(ConfigError, match=r"is a Sentinel: .*redis\+sentinel://"):
            await check(f"redis://{sentinel.address}", queue)
    finally:
        sentinel.stop()


@pytest.mark.parametrize("durable", [True, False])
async def test_a_server_that_is_not_durable_is_told_in_the_log(tmp_path, queue, caplog, durable):
    with Valkey(tmp_path, appendonly="yes" if durable else "no") as server:
        await check(f"redis://{server.address}", queue)
    assert ("redis is not durable" in caplog.text) is not durable


async def test_a_replica_is_waited_for_and_ready_says_so(tmp_path, run_worker):
    with Valkey(tmp_path, replicaof=f"{HOST} {free_port()}") as server:
        async with run_worker(f"redis://{server.address}") as (health, running):
            await wait_until_async(lambda: "read-only replica" in (health.unready() or ""))
            server.admin.replicaof("NO", "ONE")
            await wait_until_async(lambda: health.unready() is None)
            assert not running.done()


async def test_a_server_that_loads_its_files_is_waited_for_and_ready_says_so(tmp_path, run_worker):
    options = {"enable_debug_command": "yes", "loading_process_events_interval_bytes": 1024}
    with Valkey(tmp_path, appendonly="yes", **options) as server:
        server.admin.mset({f"key-{n}": "x" * 100 for n in range(10_000)})
        server.admin.config_set("key-load-delay", 10_000)  # microseconds: it would take minutes
        loading = asyncio.create_task(asyncio.to_thread(reload, server))
        async with run_worker(f"redis://{server.address}") as (health, _):
            await wait_until_async(lambda: "loading" in (health.unready() or "").lower())
            server.admin.config_set("key-load-delay", 0)
            await wait_until_async(lambda: health.unready() is None)
        await loading


def reload(server: Valkey) -> None:
    with Redis(port=server.port, socket_timeout=None) as redis:
        redis.execute_command("DEBUG RELOAD")


async def test_a_right_that_is_taken_away_later_is_named(redis_url, run_worker, monkeypatch):
    """A restart would not bring it back, so the worker lives: it is not ready."""
    monkeypatch.setattr("ingine.worker.health.READY_S", 0.5)
    with (
        a_user(redis_url, "loses-one", "~*", "&*", "+@all") as url,
        Redis.from_url(redis_url) as admin,
    ):
        async with run_worker(url) as (health, _):
            await wait_until_async(lambda: health.unready() is None)
            admin.execute_command("ACL", "SETUSER", "loses-one", "-evalsha")
            await wait_until_async(lambda: "evalsha" in (health.unready() or ""))
            assert health.unhealthy() is None
            admin.execute_command("ACL", "SETUSER", "loses-one", "+evalsha")
            await wait_until_async(lambda: health.unready() is None)


async def test_a_worker_ends_with_what_is_wrong(tmp_path, run_worker):
    with Valkey(tmp_path, config='rename-command XCLAIM ""') as server:
        async with run_worker(f"redis://{server.address}") as (_, running):
            with pytest.raises(ConfigError, match="XCLAIM"):
                await running
