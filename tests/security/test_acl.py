"""deploy/redis/users.acl on a real server: each role can do its work, and nothing else."""

import asyncio

import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import NoPermissionError, RedisError
from typer.testing import CliRunner

from ingine.cli.main import app
from ingine.contract.jobs import Job, encode_job
from ingine.contract.keys import GROUP, Keys
from ingine.contract.roles import RIGHTS, Role
from ingine.producer import AsyncClient, ClientError, JobCancelled, ServerUnavailable
from ingine.producer.events import delete_job, submitted_job
from ingine.worker.identity import name_of
from tests.security.acl_server import ROLES, USERS_FILE, AclServer, CommandLog
from tests.waiting import wait_until_async
from tests.worker.test_declared_keys import Walk, requeue_all

SHORT = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
LONG = SHORT | {"max_tokens": 400}

NOT_SEEN = {
    ("PING", ""): "sent on connections that idle for long",
    ("CLIENT|SETNAME", ""): "of the handshake, which MONITOR may miss",
    ("CLUSTER|SLOTS", ""): "asked of a cluster only",
    ("SUNSUBSCRIBE", ""): "sent if a connection outlives its last stream",
    ("XREAD", "tokens"): "of clients in other languages, see docs/protocol.md",
    ("XRANGE", "tokens"): "likewise",
    ("ZRANGE", "deadlines"): "of whoever follows replies, while none comes",
    ("HGETALL", "workers"): "of a stream that hears nothing for a while",
    ("SET", "bytes"): "where somebody has written what is no number",
    ("ZCARD", "ends"): "to see whether somebody has written another type",
    ("DEL", "fair"): "where somebody has",
}
NOT_SEEN_OF_OPERATORS = {("HSET", "job"): "where a job that is requeued still waits"}
TOLERATED = {
    "worker": {"info"},  # for the eviction policy: it copes with a refusal
    "consumer": {"zrange", "script|load"},  # to expire overdue jobs: it leaves that to others
}


async def cli(server: AclServer, role: str, queue: str, *arguments: str) -> str:
    options = ["--redis-url", server.url(role), "--queue", queue]
    done = await asyncio.to_thread(CliRunner().invoke, app, [*arguments, *options])
    assert done.exit_code == 0, (arguments, done.output, done.exception)
    return done.output


async def produce(server: AclServer, queue: str) -> str:
    """Make all calls of a producer. Returns the id of a job that has ended."""
    async with AsyncClient(server.url("producer"), queue=queue) as client:
        first = await client.submit("one", tenant="t", idempotency_key="k", reply_to="r", **SHORT)
        assert [chunk async for chunk in first.stream()][-1].position == 6
        assert (await first.result()).finish_reason == "length"
        assert (await client.status(first.job_id)).position == 6
        assert (await anext(client.replies("r"))).job_id == first.job_id
        assert (await client.submit("one", idempotency_key="k")).job_id == first.job_id
        many = await client.submit_many({"prompt": f"{n}", **SHORT} for n in range(3))
        assert all([await handle.result() for handle in many])
        server.admin.xadd(Keys(queue).replies("old"), {"event": b"", "expires_at": 1})
        options = {"metadata": {"a": 1}, "reply_to": "old", "idempotency_key": "l"}
        later = await client.submit("later", not_before_s=3600, **options)
        assert await client.cancel(later.job_id) == "cancelled"
        waits = await client.submit("waits", not_before_s=3600)
        assert [job.job_id for job in await client.jobs(status="delayed")] == [waits.job_id]
        assert await client.purge_jobs() == {"cancelled": 1, "requested": 0}
        long = await client.submit("long", **LONG)
        await anext(long.stream())
        assert (await submitted_job(client, long.job_id)).prompt == "long"
        await client.cancel(long.job_id)
        with pytest.raises(JobCancelled):
            await long.result()
        assert await delete_job(client, long.job_id) == "deleted"
        assert (await client.queue_info()).num_dead == 0
        server.look()
    job_id = (await cli(server, "producer", queue, "submit", "hello", "--max-tokens", "2")).strip()
    await cli(server, "producer", queue, "stream", job_id)
    await cli(server, "producer", queue, "status", job_id)
    return first.job_id


async def submit_and_consume(server: AclServer, queue: str) -> None:
    """Make all calls of a producer except cancelling and inspecting the queue, split between two roles."""
    submitting = AsyncClient(server.url("submitter"), queue=queue, require_worker=True)
    producer = AsyncClient(server.url("producer"), queue=queue)
    async with submitting, producer, AsyncClient(server.url("consumer"), queue=queue) as consumer:
        options = SHORT | {"tenant": "t", "reply_to": "s", "deadline_s": 3600}
        first = await submitting.submit("one", idempotency_key="s", **options)
        await submitting.submit_many([{"prompt": "2", "not_before_s": 3600}, {"prompt": "3", **options}])
        late = await submitting.submit("late", not_before_s=1, **SHORT)
        assert len((await consumer.attach(late.job_id).result()).token_ids) == 6, "it is woken for them"
        job = consumer.attach(first.job_id)
        assert [chunk async for chunk in job.stream()][-1].position == 6
        assert (await job.result()).finish_reason == "length"
        server.admin.persist(Keys(queue).idem("s"))  # as an older worker leaves it
        assert (await submitting.submit("one", idempotency_key="s")).job_id == first.job_id
        assert (await consumer.status(first.job_id)).position == 6
        replies = consumer.replies("s")
        assert first.job_id in {(await anext(replies)).job_id, (await anext(replies)).job_id}
        server.look()
        await producer.purge_jobs()


async def operate(server: AclServer, queue: str) -> None:
    """Make all calls of an operator, except draining."""
    jobs = Keys(queue).jobs("normal")
    async with AsyncClient(server.url("operator"), queue=queue) as client:
        await client.set_limits(max_jobs=1000, max_jobs_per_s=500, weights={"t": 2})
        await client.pause()
        async with AsyncClient(server.url("producer"), queue=queue) as producer:
            handle = await producer.submit("never")
            assert [job.job_id for job in await client.jobs()] == [handle.job_id]
            assert await producer.cancel(handle.job_id) == "cancelled"
            server.look()
        await client.resume()

        for raw in (b"junk", encode_job(Job(id="half", prompt="x"))[:-1]):
            server.admin.xadd(jobs, {"job": raw})
        assert "not empty" in await raised(client.set_partitions(2))
        first, second = await wait_until_async(lambda: letters(client, 2), what="two dead letters")
        await client.requeue(first.entry_id)
        assert await client.purge([second.entry_id]) == 1
        await wait_until_async(lambda: letters(client, 1), what="the first one again")
        assert await client.purge() == 1
        assert (await client.queue_info()).max_jobs == 1000
        assert (await client.status(handle.job_id)).status == "cancelled"
        server.look()
    assert "waiting" in await cli(server, "operator", queue, "queue", "show")


async def raised(awaitable) -> str:
    with pytest.raises(ClientError) as caught:
        await awaitable
    return str(caught.value)


async def letters(client: AsyncClient, number: int) -> list | None:
    found = await client.dead_letters()
    return found if len(found) == number else None


async def observe(server: AclServer, queue: str, job_id: str) -> None:
    """Make all calls of an observer."""
    async with AsyncClient(server.url("observer"), queue=queue) as client:
        assert (await client.status(job_id)).position == 6
        info = await client.queue_info()
        assert info.workers and info.num_dead == 0 and info.weights == {"t": 2}
        server.look()
    assert "waiting" in await cli(server, "observer", queue, "queue", "show")
    assert job_id in await cli(server, "observer", queue, "status", job_id, "--json")


async def work(server: AclServer, queue: str, run_worker) -> None:
    """Make workers do what the scenes above do not: delay, hand over, bury, and forget."""
    admin, keys, jobs = server.admin, Keys(queue), Keys(queue).jobs("normal")
    admin.hset(keys.models, "gone", 1)
    admin.xadd(keys.replies("older"), {"event": b"", "expires_at": 1})
    early = Job(id="early", prompt="x", sampling=SHORT, not_before_ms=300, reply_to="older")
    admin.xadd(jobs, {"job": encode_job(early)})

    deadly = admin.xadd(jobs, {"job": encode_job(Job(id="deadly", prompt="x"))})
    record = {"status": "running", "entry": deadly, "worker": "gone", "deaths": 9, "position": 0, "bytes": 1}
    admin.hset(keys.job("deadly"), mapping=record | {"attempt": 1, "submitted_at": 1, "cancel": 0})

    async with AsyncClient(server.url("producer"), queue=queue) as producer:
        await wait_until_async(lambda: admin.exists(keys.job("early")), what="its begin: by a bare XADD")
        assert (await producer.attach("early").result()).finish_reason == "length"
        assert "worker" in await raised(producer.attach("deadly").result())
        moved = await producer.submit("moved", **LONG)
        await anext(moved.stream())
        await run_worker(server.url("worker"))
        async with AsyncClient(server.url("operator"), queue=queue) as operator:
            await wait_until_async(lambda: admin.hlen(keys.workers) == 2, what="the second worker")
            server.look()  # while the first worker is still connected
            await operator.drain("w0")
            server.look()
        assert (await moved.result()).finish_reason == "length"

    def consumers() -> set[str]:
        return {name_of(consumer["name"].decode()) for consumer in admin.xinfo_consumers(jobs, GROUP)}

    await wait_until_async(lambda: "w0" not in consumers(), what="the first worker being forgotten")
    server.look()


async def call_every_script(server: AclServer, queue: str) -> None:
    """Call the scripts that the scenes above may not need, such as adopting and parking."""
    redis = AsyncRedis.from_url(server.url("worker"))
    operator = AsyncClient(server.url("operator"), queue=queue)
    async with redis, operator, AsyncClient(server.url("producer"), queue=queue) as producer:
        await Walk(producer, redis, Keys(queue), 1).run()
        await requeue_all(operator)
        server.look()
    async with AsyncClient(server.url("operator"), queue=f"{queue}-parts") as operator:
        await operator.set_partitions(2)
        server.look()


@pytest.fixture
async def commands_of_all(acl_server, queue, run_worker, monkeypatch) -> CommandLog:
    monkeypatch.setattr("ingine.worker.heartbeat.FORGET_EVERY", 1)
    monkeypatch.setattr("ingine.worker.heartbeat.FORGET_AFTER_S", 3)
    acl_server.forget_refusals()
    await run_worker(acl_server.url("worker"), max_bytes=1 << 20)
    acl_server.admin.script_flush()
    with CommandLog(acl_server) as commands:
        job_id = await produce(acl_server, queue)
        acl_server.admin.script_flush()  # each role shall be seen loading its scripts
        await operate(acl_server, queue)
        acl_server.admin.script_flush()
        await submit_and_consume(acl_server, queue)
        await observe(acl_server, queue, job_id)
        await work(acl_server, queue, run_worker)
        await call_every_script(acl_server, f"{queue}-scripts")
    return commands


async def test_each_role_can_do_its_work_and_has_no_command_to_spare(acl_server, commands_of_all):
    spare = {}
    for role in Role:
        assert acl_server.refusals(role) <= TOLERATED.get(role, set()), role
        allowed = {(name, kind) for kind, names in RIGHTS[role].items() for name in names}
        spare[role] = allowed - commands_of_all.used(role) - NOT_SEEN.keys()
        if role == Role.OPERATOR:
            spare[role] -= NOT_SEEN_OF_OPERATORS.keys()
    assert not any(spare.values()), f"never used: {spare}"


EVAL = "return redis.call('GET', KEYS[1])"
NOBODY_MAY = [
    *(("FLUSHALL",), ("FLUSHDB",), ("SHUTDOWN", "NOSAVE"), ("SAVE",), ("BGREWRITEAOF",), ("LASTSAVE",)),
    *(("CONFIG", "GET", "*"), ("CONFIG", "SET", "maxmemory", "1"), ("CONFIG", "REWRITE")),
    *(("ACL", "LIST"), ("ACL", "SETUSER", "x", "on"), ("ACL", "WHOAMI"), ("INFO",), ("MONITOR",)),
    *(("KEYS", "*"), ("SCAN", "0"), ("RANDOMKEY",), ("DBSIZE",), ("SELECT", "1"), ("SWAPDB", "0", "1")),
    *(
        ("CLIENT", "LIST"),
        ("CLIENT", "KILL", "TYPE", "normal"),
        ("CLIENT", "PAUSE", "1"),
        ("REPLICAOF", "h", "1"),
    ),
    *(("MODULE", "LIST"), ("SLOWLOG", "GET"), ("LATENCY", "RESET"), ("MIGRATE", "h", "1", "k", "0", "1")),
    *(("SCRIPT", "FLUSH"), ("SCRIPT", "KILL"), ("FUNCTION", "LOAD", "x"), ("EVAL", EVAL, "1", "other")),
    *(
        ("GET", "other"),
        ("SET", "other", "1"),
        ("GET", "ingine"),
        ("GET", "ingine:q:bytes"),
        ("DEL", "other"),
    ),
    *(("HGETALL", "other:{q}:queue"), ("RESTORE", "ingine:{q}:bytes", "0", "x"), ("RENAME", "a", "b")),
    *(
        ("SUBSCRIBE", "ingine:{q}:control"),
        ("PSUBSCRIBE", "*"),
        ("SPUBLISH", "other", "x"),
        ("PUBLISH", "x", "y"),
    ),
    *(
        ("PUBSUB", "CHANNELS"),
        ("XINFO", "STREAM", "ingine:{q}:dead"),
        ("XGROUP", "DESTROY", "ingine:{q}:x", "g"),
    ),
    *(("XTRIM", "ingine:{q}:jobs:low", "MAXLEN", "0"), ("OBJECT", "FREQ", "ingine:{q}:bytes")),
]


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("command", NOBODY_MAY, ids=" ".join)
def test_what_is_nobodys_is_refused(acl_server, role, command):
    with Redis.from_url(acl_server.url(role)) as redis, pytest.raises(NoPermissionError):
        redis.execute_command(*command)


async def test_what_the_document_says_an_observer_can_read_after_all(acl_server, queue):
    async with AsyncClient(acl_server.url("producer"), queue=queue) as client:
        now = await client.submit("a prompt that waits")
        later = await client.submit("a prompt that is delayed", not_before_s=3600)
    with Redis.from_url(acl_server.url("observer")) as redis:
        assert b"a prompt" not in b"".join(redis.hgetall(Keys(queue).job(now.job_id)).values())
        assert b"a prompt that is delayed" in redis.hgetall(Keys(queue).job(later.job_id))[b"raw"]


@pytest.mark.parametrize("role", ["operator", "consumer"])
async def test_who_does_not_submit(acl_server, queue, role):
    async with AsyncClient(acl_server.url(role), queue=queue) as client:
        with pytest.raises(ServerUnavailable, match=r"permission|can't (run|access)"):
            await client.submit("x")


async def test_a_submitter_neither_follows_nor_cancels(acl_server, queue):
    async with AsyncClient(acl_server.url("submitter"), queue=queue) as client:
        job = await client.submit("x")
        for call in (job.result, job.cancel):
            with pytest.raises(ServerUnavailable, match="permission"):
                await call()


def test_nobody_gets_in_without_a_password(acl_server):
    with (
        Redis(port=acl_server.port, retry=None) as redis,
        pytest.raises(RedisError, match=r"Authentication required|NOAUTH|authenticated"),
    ):
        redis.ping()
    with (
        Redis(port=acl_server.port, username="default", password="", retry=None) as redis,
        pytest.raises(RedisError),
    ):
        redis.ping()


def test_a_file_without_passwords_lets_no_server_start():
    assert all(f"#SHA256-OF-{role.upper()}-PASSWORD" in USERS_FILE.read_text() for role in ROLES)
