"""Clients that find their server: a single one, behind Sentinel, in a cluster. All servers are real."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trustme
from redis.asyncio import Redis
from redis.exceptions import ConnectionError, RedisError, ResponseError

from ingine.connect.server_errors import WrongServer
from ingine.connect.servers import Servers
from ingine.connect.url import check_url, redact
from ingine.contract.keys import Keys, all_partitions
from ingine.errors import ConfigError
from ingine.worker.server_check import check_server
from tests.security.tls import TlsFront
from tests.servers import HOST, Cluster, Valkey, Watched, cluster, free_port, watched_pair
from tests.waiting import HANGS_S, wait_until_async

SET_TWO = "redis.call('SET', KEYS[1], ARGV[1]) redis.call('SET', KEYS[2], ARGV[1]) return ARGV[1]"


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster")) as servers:
        yield servers


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Watched]:
    with watched_pair(tmp_path) as servers:
        yield servers


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> Path:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return path


@asynccontextmanager
async def connected(url: str, *, retries: int = 5) -> AsyncIterator[Servers]:
    servers = Servers(url, client_name="ingine-test", retries=retries)
    try:
        yield servers
    finally:
        await servers.aclose()


async def patiently(call: Callable[[], Awaitable[Any]]) -> Any:
    """Call as a worker does: again and again, whatever happens to the server."""

    async def served() -> list[Any]:
        try:
            return [await call()]
        except RedisError:
            return []

    return (await wait_until_async(served))[0]


# ------------------------------------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "rediss://user:p%40ss@host:1/3?ssl_cert_reqs=none",
        "unix:///run/valkey.sock?db=1",
        "redis+sentinel://user:pw@a:1,b,[::1]:3/primary/2?sentinel_password=other",
        "rediss+cluster://:pw@a,b:2?ssl_ca_certs=CA_FILE",
    ],
)
def test_a_url_that_can_be_used(url: str, ca_file: Path):
    url = url.replace("CA_FILE", str(ca_file))
    assert check_url(url) == url
    servers = Servers(url, client_name="x")
    shown = f"{servers.where} {servers!r} {servers.client(Keys())!r}"
    assert not {"pw", "p%40ss", "p@ss", "other"} & set(shown.replace(":", " ").replace("@", " ").split())


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("http://user:pw@host", r"must begin with redis://, rediss://.* or rediss\+cluster://"),
        ("redis://user:pw/x@host", "is no URL that can be read"),
        ("redis://user:pw@host:port", "is no URL that can be read"),
        ("redis://user:pw@a,b", r"use redis\+sentinel:// or redis\+cluster://"),
        ("redis+sentinel://user:pw@a,b", "lacks the name of the primary"),
        ("redis+cluster://user:pw@a/1", "names a database"),
        ("redis://user:pw@host?decode_responses=1", "must not set decode_responses"),
        ("redis://user:pw@host?colour=green", "has an option that the URL of a server cannot have"),
        ("rediss://user:pw@host?ssl_ca_certs=/nowhere", "No such file"),
    ],
)
def test_a_url_that_cannot(url: str, says: str):
    with pytest.raises(ConfigError, match=rf"^INGINE_REDIS_URL \(--redis-url\) .*{says}") as refused:
        Servers(url, client_name="x")
    assert "pw" not in str(refused.value)


def test_a_redacted_url_has_neither_password_nor_options():
    assert redact("redis+cluster://me:a@b@x:1,y:2/0?password=c") == "redis+cluster://me:***@x:1,y:2/0"


@pytest.mark.parametrize("user", ["@", "m@e", "m/e", "", "/", "?", "m\ne"])
@pytest.mark.parametrize("password", ["geheim", "a@heim", "a/heim", "heim?a", "a#heim", "a:heim", "a\nheim"])
def test_a_redacted_url_has_no_password_wherever_it_seems_to_begin(user, password):
    for scheme in ("redis", "rediss", "redis+sentinel", "redis+cluster"):
        assert "heim" not in redact(f"{scheme}://{user}:{password}@x:1,y:2/a/0")


def test_a_password_is_not_taken_for_the_name_of_a_primary():
    with pytest.raises(ValueError, match="no URL that can be read"):
        check_url("redis+sentinel://us/er:geheim@a:1,b:2/0")


# ------------------------------------------------------------------------------------- one server


async def test_on_one_server_all_partitions_share_a_client(redis_url: str, queue: str):
    async with connected(redis_url) as servers:
        first, second = (servers.client(keys) for keys in all_partitions(queue, 2))
        assert first is second
        assert await first.set(Keys(queue).settings, "x")
        assert await first.client_getname() == "ingine-test"


def knows_capa(server: Valkey) -> bool:
    try:
        return server.admin.execute_command("CLIENT CAPA", "redirect")
    except ResponseError:
        return False


async def test_a_primary_that_became_a_replica_is_left(tmp_path: Path, queue: str):
    """The address now leads to another server; here it is a link to a socket."""
    link, (old_socket, new_socket) = tmp_path / "link", (tmp_path / "old.sock", tmp_path / "new.sock")
    link.symlink_to(old_socket)
    with (
        Valkey(tmp_path / "old", unixsocket=old_socket) as old,
        Valkey(tmp_path / "new", unixsocket=new_socket) as new,
    ):
        url = f"unix://{link}"
        async with connected(url) as patient, connected(url, retries=0) as hasty, connected(url) as reader:
            for servers in (patient, hasty, reader):
                await servers.client(Keys(queue)).set("key", 1)
            old.admin.replicaof(HOST, free_port())  # it will never be in sync again
            link.unlink()
            link.symlink_to(new_socket)
            await patient.client(Keys(queue)).eval(SET_TWO, 2, "key", "other", 2)
            # Redis does not tell clients that only read, and goes on answering them with what it had.
            seen = b"2" if knows_capa(old) else b"1"
            assert await reader.client(Keys(queue)).get("key") == seen
            with pytest.raises(WrongServer, match="replica"):
                await hasty.client(Keys(queue)).set("key", 3)
            await hasty.client(Keys(queue)).set("key", 3)
            assert new.admin.get("key") == "3"


async def test_a_primary_without_enough_replicas_is_left(tmp_path: Path):
    with Valkey(tmp_path, min_replicas_to_write=1) as server:
        async with connected(f"redis://{server.address}", retries=0) as servers:
            with pytest.raises(WrongServer, match="lost its replicas"):
                await servers.client(Keys()).set("key", 1)


async def test_a_fault_of_the_command_is_nothing_of_that(redis_url: str, queue: str):
    async with connected(redis_url, retries=0) as servers:
        redis = servers.client(Keys(queue))
        with pytest.raises(ResponseError, match="not an integer"):
            await redis.eval("return redis.call('INCRBY', KEYS[1], 'x')", 1, queue)


# --------------------------------------------------------------------------------------- Sentinel


async def test_clients_follow_a_primary_that_was_killed(pair: Watched, queue: str):
    async with connected(pair.url, retries=0) as servers:
        redis = servers.client(Keys(queue))
        await redis.set("key", 1)
        await asyncio.to_thread(pair.kill_primary)
        with pytest.raises(ConnectionError):
            await redis.set("key", 2)
        await patiently(lambda: redis.set("key", 2))
        assert pair.primary.admin.get("key") == "2"


async def test_a_hand_over_between_primaries_breaks_nothing_but_connections(pair: Watched, queue: str):
    pair.skip_without_hand_over()
    async with connected(pair.url, retries=0) as servers:
        redis, keys = servers.client(Keys(queue)), Keys(queue)
        await patiently(lambda: redis.xgroup_create(keys.dead, "g", "0", mkstream=True))
        reader = asyncio.ensure_future(
            patiently(lambda: redis.xreadgroup("g", "c", {keys.dead: ">"}, block=0))
        )
        await asyncio.to_thread(pair.change_places)
        await patiently(lambda: redis.xadd(keys.dead, {"job": "x"}))
        [[_, [[_, fields]]]] = await reader
        assert fields == {b"job": b"x"}


async def test_passwords_for_servers_and_sentinels(tmp_path: Path, queue: str):
    with watched_pair(tmp_path, password="inner", sentinel_password="outer") as pair:
        right = pair.url.replace("//", "//:inner@") + "?sentinel_password=outer"
        async with connected(right, retries=0) as servers:
            assert await servers.client(Keys(queue)).set("key", 1)
        address = re.escape(pair.sentinel.address)
        for wrong, says in [
            (right.replace("inner", "secret"), "invalid username-password pair"),
            (right.replace("outer", "secret"), f"No master found for 'primary' : {address} .*Authentication"),
        ]:
            async with connected(wrong, retries=0) as servers:
                with pytest.raises(ConnectionError, match=says) as refused:
                    await servers.client(Keys(queue)).set("key", 1)
                assert not re.search("inner|outer|secret", str(refused.value))


async def test_no_such_primary(pair: Watched):
    async with connected(pair.url.replace("/primary", "/other"), retries=0) as servers:
        with pytest.raises(ConnectionError, match="No master found for 'other'"):
            await servers.client(Keys()).set("key", 1)


# ---------------------------------------------------------------------------------------- cluster


async def test_each_partition_is_at_its_node(three: Cluster, queue: str):
    async with connected(three.url) as servers:
        partitions = all_partitions(queue, 8)
        for n, keys in enumerate(partitions):
            async with servers.client(keys).pipeline(transaction=True) as pipeline:
                await pipeline.set(keys.settings, n).set(keys.control, n).execute()
            assert three.owner(keys.settings).admin.get(keys.settings) == str(n)
        assert len({three.owner(keys.settings).port for keys in partitions}) > 1


async def test_any_node_will_do_as_a_seed(three: Cluster, queue: str):
    async with connected(f"redis+cluster://{HOST}:{free_port()},{three.nodes[2].address}") as servers:
        for keys in all_partitions(queue, 4):
            assert await servers.client(keys).set(keys.settings, 1)


async def test_clients_follow_a_slot_to_another_node(three: Cluster, queue: str):
    keys = Keys(queue)
    async with connected(three.url) as patient, connected(three.url, retries=0) as hasty:
        script = patient.client(keys).register_script(SET_TWO)
        await script(keys=[keys.settings, keys.control], args=["before"])
        assert await hasty.client(keys).get(keys.settings) == b"before"
        three.move(keys.settings)
        await script(keys=[keys.settings, keys.control], args=["after"])
        with pytest.raises(WrongServer, match="another node"):
            await hasty.client(keys).get(keys.settings)
        assert await hasty.client(keys).get(keys.settings) == b"after"

        pipeline = patient.client(keys).pipeline(transaction=False)
        three.move(keys.settings)
        pipeline.get(keys.settings).get(keys.control)
        assert await pipeline.execute() == [b"after", b"after"]


async def test_what_a_moving_slot_refuses_ends_well_once_it_has_moved(three: Cluster, queue: str):
    keys = Keys(queue)
    async with connected(three.url, retries=0) as servers:
        redis = servers.client(keys)
        await redis.set(keys.settings, "here")
        source, target = three.begin_move(keys.settings)
        with pytest.raises(WrongServer, match="moves to another node"):
            await redis.eval(SET_TWO, 2, keys.settings, keys.control, "x")
        with pytest.raises(WrongServer, match="moves to another node"):
            await redis.set(keys.dead, "x")
        three.end_move(keys.settings, source, target)
        await patiently(lambda: redis.eval(SET_TWO, 2, keys.settings, keys.control, "x"))
        assert target.admin.get(keys.settings) == "x"


async def test_a_blocking_read_goes_where_the_slot_goes(three: Cluster, queue: str):
    keys = Keys(queue)
    async with connected(three.url, retries=0) as servers:
        redis = servers.client(keys)
        await redis.xadd(keys.dead, {"n": 1})
        reader = asyncio.ensure_future(patiently(lambda: redis.xread({keys.dead: "$"}, block=0)))
        old = three.owner(keys.dead)
        await wait_until_async(lambda: old.admin.info("clients")["blocked_clients"], what="a blocked reader")
        three.move(keys.dead)
        new = three.owner(keys.dead)
        await wait_until_async(lambda: new.admin.info("clients")["blocked_clients"], what="a blocked reader")
        await redis.xadd(keys.dead, {"n": 2})
        [[_, [[_, fields]]]] = await reader
        assert fields == {b"n": b"2"}


async def test_a_node_that_was_killed_and_comes_back(tmp_path: Path, queue: str):
    with cluster(tmp_path) as three:
        async with connected(three.url, retries=0) as servers:
            lost, *_ = partitions = all_partitions(queue, 8)
            for keys in partitions:
                await servers.client(keys).set(keys.settings, "kept")
            node = three.owner(lost.settings)
            elsewhere = next(keys for keys in partitions if three.owner(keys.settings) is not node)
            node.kill()
            with pytest.raises(ConnectionError):
                await servers.client(lost).get(lost.settings)
            assert await servers.client(elsewhere).get(elsewhere.settings) == b"kept"
            node.start()
            assert await patiently(lambda: servers.client(lost).get(lost.settings)) == b"kept"


async def test_live_messages_of_a_partition(three: Cluster, queue: str):
    async with connected(three.url) as servers:
        for keys in all_partitions(queue, 4):
            redis, channel = servers.client(keys), keys.channel("x")
            async with redis.pubsub() as pubsub:
                await pubsub.ssubscribe(channel)
                assert (await pubsub.get_message(timeout=HANGS_S))["type"] == "ssubscribe"
                await redis.eval("return redis.call('SPUBLISH', KEYS[1], ARGV[1])", 1, channel, "hello")
                message = await pubsub.get_message(timeout=HANGS_S)
                assert (message["type"], message["data"]) == ("smessage", b"hello")


async def test_a_cluster_behind_a_plain_url_says_what_to_do(three: Cluster, queue: str):
    keys = next(
        keys for keys in all_partitions(queue, 16) if three.owner(keys.settings) is not three.nodes[0]
    )
    async with connected(f"redis://{three.nodes[0].address}", retries=0) as servers:
        with pytest.raises(WrongServer, match=r"redis\+cluster://"):
            await servers.client(keys).set(keys.settings, 1)
        with pytest.raises(ConfigError, match=r"redis\+cluster://.*a node of a cluster"):
            await check_server(servers.client(keys), servers.where, keys)
    async with connected(three.url) as servers:
        await check_server(servers.client(keys), servers.where, keys)


async def test_a_plain_server_is_no_cluster(redis_url: str):
    async with connected(redis_url.replace("redis:", "redis+cluster:").removesuffix("/0")) as servers:
        with pytest.raises(ResponseError, match="cluster support disabled"):
            await servers.client(Keys()).set("key", 1)


# -------------------------------------------------------------------------------------------- TLS


@pytest.mark.parametrize("scheme", ["rediss", "rediss+cluster"])
async def test_tls(tmp_path: Path, ca_file: Path, authority: trustme.CA, queue: str, scheme: str):
    keys = Keys(queue)
    options = {"cluster_enabled": "yes", "cluster_port": free_port()} if "cluster" in scheme else {}
    with Valkey(tmp_path, **options) as server, TlsFront(authority, server.port) as front:
        if options:
            server.admin.config_set("cluster-announce-port", front.port)
            server.admin.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        url = f"{scheme}://{HOST}:{front.port}"
        async with connected(f"{url}?ssl_ca_certs={ca_file}") as servers:
            assert await patiently(lambda: servers.client(keys).set(keys.settings, 1))
        async with connected(url, retries=0) as servers:
            with pytest.raises(ConnectionError, match="certificate"):
                await servers.client(keys).set(keys.settings, 2)


async def test_a_certificate_is_for_the_name_that_the_cluster_answers(
    tmp_path: Path, ca_file: Path, authority: trustme.CA, queue: str
):
    keys, options = Keys(queue), {"cluster_enabled": "yes", "cluster_port": free_port()}
    with (
        Valkey(tmp_path, cluster_announce_ip=HOST, **options) as server,
        TlsFront(authority, server.port, host="localhost") as front,
    ):
        server.admin.config_set("cluster-announce-port", front.port)
        server.admin.execute_command("CLUSTER ADDSLOTSRANGE", 0, 16383)
        url = f"rediss+cluster://localhost:{front.port}?ssl_ca_certs={ca_file}"
        async with connected(url, retries=0) as servers:
            with pytest.raises(ConnectionError, match=r"certificate is not valid for '127\.0\.0\.1'"):
                await servers.client(keys).set(keys.settings, 1)
            server.admin.config_set("cluster-announce-hostname", "localhost")
            server.admin.config_set("cluster-preferred-endpoint-type", "hostname")
            assert await patiently(lambda: servers.client(keys).set(keys.settings, 2))


async def test_a_client_of_redis_py_stays_one(redis_url: str):
    async with connected(redis_url) as servers:
        assert type(servers.client(Keys())) is Redis


@pytest.mark.parametrize(
    "url",
    [
        "redis://:pw?x@host:6379/0",
        "redis://:12?pw@host:6379/0",  # what is before the ? reads as a port
        "redis://user:12?pw@host?db=1",
        "redis://:12?db=1&pw@host",
    ],
)
def test_a_question_mark_in_a_password_is_to_be_escaped(url: str):
    with pytest.raises(ConfigError, match=r"is no URL that can be read.*%3F") as refused:
        Servers(url, client_name="x")
    assert "pw" not in str(refused.value)


def test_an_at_sign_in_an_option_is_fine():
    assert check_url("redis://host:6379/0?password=p@w")
