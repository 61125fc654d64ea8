"""Each role tries every command on every kind of key and channel, of its own queue and of others."""

import re
from collections.abc import Iterator

import pytest
from redis import Redis
from redis.asyncio import Redis as AsyncRedis
from redis.exceptions import NoPermissionError, RedisError
from typer.testing import CliRunner

from ingine.cli.main import app
from ingine.contract.keys import Keys, all_partitions
from ingine.contract.roles import CHANNELS, KINDS, RIGHTS, Role, tags_of, user_line
from ingine.errors import ConfigError
from ingine.producer import AsyncClient, DuplicateJob, QueueFull
from tests.security.acl_server import USERS_FILE
from tests.worker.test_declared_keys import Walk, requeue_all
from tests.worker.test_server_check import OF_THE_HANDSHAKE, check

ARGUMENTS = {
    "DECRBY": "1",
    "EXPIRE": "9",
    "HDEL": "f",
    "HGET": "f",
    "HINCRBY": "f 1",
    "HMGET": "f",
    "HSET": "f v",
    "HSETNX": "f v",
    "INCRBY": "1",
    "PEXPIRE": "9",
    "SET": "v",
    "SPUBLISH": "forged",
    "XACK": "workers 1-1",
    "XADD": "* event forged",
    "XCLAIM": "workers me 0 1-1",
    "XDEL": "1-1",
    "XGROUP|CREATE": "g 0",
    "XGROUP|DELCONSUMER": "workers me",
    "XINFO|CONSUMERS": "workers",
    "XPENDING": "workers",
    "XRANGE": "- +",
    "ZADD": "1 m",
    "ZRANGE": "0 1",
    "ZREM": "m",
    "ZREMRANGEBYSCORE": "0 1",
    "ZSCORE": "m",
}
"""Arguments after the key, for commands that need some."""
TWO_KEYS = {"SMOVE": ["m"], "LMOVE": ["LEFT", "LEFT"], "ZRANGESTORE": ["0", "1"]}
SCRIPTED = [role for role in Role if "EVALSHA" in RIGHTS[role][""]]
REFUSED = r"NOPERM|permission|ACL|can't (run|access|publish)"
AT_NO_KEY = {name for rights in RIGHTS.values() for name in rights[""]}
COMMANDS = sorted(
    {name for rights in RIGHTS.values() for names in rights.values() for name in names} - AT_NO_KEY
)


def request(name: str, key: str) -> list[str]:
    match name:
        case "XREAD":
            return ["XREAD", "STREAMS", key, "0"]
        case "XREADGROUP":
            return ["XREADGROUP", "GROUP", "workers", "me", "STREAMS", key, ">"]
        case _:
            return [*name.split("|"), key, *ARGUMENTS.get(name, "").split()]


def named(tag: str) -> dict[str, str]:
    """A key or channel of each kind, of the queue or partition with this hash tag."""
    return {kind: f"ingine:{{{tag}}}:{end.replace('*', 'a')}" for kind, end in (KINDS | CHANNELS).items()}


def attempts(tag: str) -> Iterator[tuple[str, str, list[str]]]:
    """Every command on every kind: the names of both, and the call."""
    for kind, key in named(tag).items():
        for name in COMMANDS:
            if (kind in CHANNELS) == (name in ("SPUBLISH", "SSUBSCRIBE")):
                yield name, kind, request(name, key)


def is_right(role: Role, name: str, kind: str) -> bool:
    return name in RIGHTS[role].get(kind, ())


@pytest.fixture
def narrowed(acl_server, queue) -> str:
    """A queue with users of its own."""
    acl_server.add_users(queue)
    return queue


def neighbours(queue: str) -> list[str]:
    """Queues with similar names."""
    return [f"{queue}.1", f"{queue}-", queue[:-1], f"{queue[:-1]}?", f"{queue[:-1]}*", "default"]


# --------------------------------------------------------------------------------------- the list itself


def test_the_file_in_deploy_has_what_the_command_prints():
    first, *lines = USERS_FILE.read_text().splitlines()
    assert first == "user default off"
    digest = "SHA256-OF-{}-PASSWORD"
    assert lines == [user_line(r, f"ingine-{r}", digest.format(r.upper()), tags_of("*")) for r in Role]


@pytest.mark.parametrize("tags", [tags_of("q"), tags_of("*")], ids=["one queue", "all"])
def test_each_key_is_of_one_kind(tags):
    keys = Keys("q")
    plain = [keys.delayed, keys.deadlines, keys.bytes, keys.dead, keys.workers, keys.models, keys.settings]
    with_ids = [keys.job, keys.tokens, keys.replies, keys.idem, keys.rate, keys.channel]
    of_priorities = [make("low") for make in (keys.jobs, keys.fair, keys.ends, keys.set_aside)]
    found = []
    for key in [*plain, keys.control, *of_priorities, *(make("a:b}:c") for make in with_ids)]:
        for kind, end in (KINDS | CHANNELS).items():
            pattern = re.escape(f"ingine:{{{tags[0]}}}:{end}").replace(r"\*", ".*")
            found += [kind] if re.fullmatch(pattern, key) else []
    assert sorted(found) == sorted(KINDS | CHANNELS)


def test_the_command_prints_users_that_the_server_takes(acl_server, queue):
    done = CliRunner().invoke(app, ["acl", "--queue", queue, "consumer", "worker"])
    assert done.exit_code == 0
    for line, url in zip(done.stdout.splitlines(), done.stderr.splitlines(), strict=True):
        _, user, rules = line.split(maxsplit=2)
        acl_server.admin.execute_command("ACL", "SETUSER", user, "on", "~*", "&*", "+@all", "(~* +get)")
        acl_server.admin.execute_command("ACL", "SETUSER", user, *rules.split())
        with Redis.from_url(url.replace("HOST:6379", f"127.0.0.1:{acl_server.port}")) as redis:
            assert redis.ping() and redis.hget(Keys(queue).settings, "partitions") is None
            with pytest.raises(NoPermissionError):
                redis.hget(Keys(f"{queue}2").settings, "partitions")
        assert url.rpartition(":")[0].count(":") == 2 and not re.search(r"\b[0-9a-f]{64}@", done.stdout)


def test_the_command_refuses_a_name_with_a_pattern_in_it():
    done = CliRunner().invoke(app, ["acl", "--queue", "theirs*"])
    assert done.exit_code == 2 and "user" not in done.stdout


# ------------------------------------------------------------------------------------------ attacks


@pytest.mark.parametrize("role", Role)
def test_a_role_has_its_rights_on_its_own_queue_and_no_other_there(acl_server, narrowed, role):
    for name, kind, call in attempts(narrowed):
        said = acl_server.admin.execute_command("ACL", "DRYRUN", f"{narrowed}-{role}", *call)
        assert (said == b"OK") == is_right(role, name, kind), (name, kind, said)


@pytest.mark.parametrize("role", Role)
def test_a_role_has_no_right_on_any_other_queue(acl_server, narrowed, role):
    """Every call is made. None may access anything of the other queue."""
    with Redis.from_url(acl_server.url(role, narrowed)) as redis:
        for tag in neighbours(narrowed):
            pipeline = redis.pipeline(transaction=False)
            tried = [call for *_, call in attempts(tag) if call[0] != "SSUBSCRIBE"]
            for call in tried:
                pipeline.execute_command(*call)
            answers = pipeline.execute(raise_on_error=False)
            assert [
                c for c, a in zip(tried, answers, strict=True) if not isinstance(a, NoPermissionError)
            ] == []
            for channel in CHANNELS:
                with pytest.raises(NoPermissionError):
                    redis.execute_command("SSUBSCRIBE", named(tag)[channel])
            for both in (pair := (named(narrowed)["jobs"], named(tag)["jobs"]), pair[::-1]):
                for name in ("RENAME", "COPY", "SMOVE", "LMOVE", "ZRANGESTORE"):
                    with pytest.raises(NoPermissionError):
                        redis.execute_command(name, *both, *TWO_KEYS.get(name, ()))
            assert len(tried) > 15 * len(KINDS)


@pytest.mark.parametrize("role", SCRIPTED)
def test_a_script_of_ones_own_has_no_right_that_its_caller_has_not(acl_server, narrowed, role):
    """The script names no key.

    It calls what its caller may not on its own queue, and everything on others.
    """
    run = "local answer = redis.pcall(unpack(ARGV)) return answer.err or 'it ran'"
    tried = [call for name, kind, call in attempts(narrowed) if not is_right(role, name, kind)]
    tried += [call for tag in neighbours(narrowed) for *_, call in attempts(tag)]
    tried += [["FLUSHALL"], ["CONFIG", "GET", "*"], ["ACL", "LIST"], ["PUBLISH", "x", "y"], ["GET", "other"]]
    with Redis.from_url(acl_server.url(role, narrowed)) as redis:
        digest = redis.script_load(run)
        pipeline = redis.pipeline(transaction=False)
        for call in tried:
            pipeline.execute_command("EVALSHA", digest, 0, *call)
        answers = [str(answer) for answer in pipeline.execute(raise_on_error=False)]
        not_refused = [
            (call, answer)
            for call, answer in zip(tried, answers, strict=True)
            if not re.search(REFUSED + "|not allowed from script", answer)
        ]
        assert not_refused == []
        for tag in neighbours(narrowed):
            with pytest.raises(NoPermissionError):
                redis.evalsha(digest, 1, named(tag)["job"], "PING")


@pytest.mark.parametrize("role", ["consumer", "observer"])
def test_who_only_reads_runs_no_script_even_one_that_is_known(acl_server, narrowed, role):
    digest = acl_server.admin.script_load("return 1")
    with Redis.from_url(acl_server.url(role, narrowed)) as redis:
        for call in (["EVALSHA", digest, "0"], ["EVAL", "return 1", "0"], ["SCRIPT", "LOAD", "return 1"]):
            with pytest.raises(NoPermissionError):
                redis.execute_command(*call)


def test_the_users_of_a_queue_in_partitions_have_those_alone(acl_server, queue):
    acl_server.add_users(queue, partitioned=True)
    user = f"{queue}-worker"
    own = [keys.job("a") for number in (1, 2, 64) for keys in all_partitions(queue, number)]
    others = [
        Keys(f"{queue}{end}").job("a") for end in (".70", ".100", ".1x", ".x", "..1", ".1.1", "1", "-0.1")
    ]
    for key in own:
        assert acl_server.admin.execute_command("ACL", "DRYRUN", user, "HGET", key, "f") == b"OK", key
    for key in others:
        assert b"no permissions" in acl_server.admin.execute_command(
            "ACL", "DRYRUN", user, "HGET", key, "f"
        ), key


# ------------------------------------------------------------------------------------------ work


@pytest.mark.parametrize("number", [1, 3])
async def test_narrowed_users_can_call_every_script(acl_server, queue, number):
    acl_server.add_users(queue, partitioned=number > 1)
    acl_server.forget_refusals()
    operator = AsyncClient(acl_server.url("operator", queue), queue=queue)
    async with operator, AsyncClient(acl_server.url("producer", queue), queue=queue) as producer:
        if number > 1:
            await operator.set_partitions(number)
        for keys in all_partitions(queue, number):
            redis = AsyncRedis.from_url(acl_server.url("worker", queue))
            await Walk(producer, redis, keys, number).run()
            await redis.aclose()
        await requeue_all(operator)
    log = [entry for entry in acl_server.admin.acl_log(128) if entry["username"].startswith(queue)]
    assert [entry for entry in log if entry["object"] not in OF_THE_HANDSHAKE] == []


async def test_a_worker_of_another_queue_ends_at_its_start(acl_server, narrowed, run_worker):
    running = await run_worker(acl_server.url("worker", narrowed), queue=f"{narrowed}2")
    with pytest.raises(
        ConfigError, match=rf"run EVALSHA \(job:0.*on keys and channels of ingine:{{{narrowed}2}}"
    ):
        await running


async def test_a_worker_that_lacks_any_right_ends_at_its_start_and_names_it(acl_server, narrowed):
    """Each part of a worker's line is left out in turn, channels too."""
    user = f"{narrowed}-worker"
    line = user_line(Role.WORKER, user, "0" * 64, tags_of(narrowed))
    parts = re.findall(r"\([^)]*\)", line)
    assert len(parts) == 1 + len(KINDS) - 1 + len(CHANNELS)  # a worker needs no rate, and EVALSHA any key
    url = acl_server.url("worker", narrowed)
    await check(url, narrowed)
    for part in parts:
        rules = [rule for rule in [*re.sub(r"\(.*", "", line).split()[5:], *parts] if rule != part]
        acl_server.admin.execute_command("ACL", "SETUSER", user, "clearselectors", *" ".join(rules).split())
        names, on = re.findall(r"\+(\w+)", part), re.search(r"}:(\w*)", part)[1]
        if names == ["evalsha"]:
            says = "says: .*'evalsha'"
        else:
            says = rf"run .*{names[0]}[^,]* \(.*{on}.*\) on keys and channels of .*{narrowed}"
        with pytest.raises(ConfigError, match=f"(?i){says}.*ingine acl worker"):
            await check(url, narrowed)


# ------------------------------------------------------------- what remains possible, as the document says


async def test_what_a_submitter_can_do_to_others(acl_server, narrowed):
    keys = Keys(narrowed)
    producer = AsyncClient(acl_server.url("producer", narrowed), queue=narrowed)
    hostile = AsyncRedis.from_url(acl_server.url("submitter", narrowed))
    async with (
        producer,
        hostile,
        AsyncClient(acl_server.url("submitter", narrowed), queue=narrowed) as client,
    ):
        waits = await producer.submit("waits")
        later = await producer.submit("a prompt of later", not_before_s=3600)
        assert await hostile.xadd(keys.jobs("high"), {"job": b"past the limits"})
        assert b"a prompt of later" in await hostile.hget(keys.job(later.job_id), "raw")
        await hostile.hset(keys.job(later.job_id), "raw", "another prompt")
        await hostile.hset(keys.job(waits.job_id), mapping={"cancel": 1, "deaths": 0})
        await hostile.zadd(keys.delayed, {later.job_id: 1e15})
        await hostile.incrby(keys.bytes, 1 << 30)
        with pytest.raises(QueueFull):
            await producer.submit("x")
        await hostile.incrby(keys.bytes, -(1 << 30))
        taken = await client.submit("mine", job_id="taken", idempotency_key="key")
        assert (await producer.submit("theirs", idempotency_key="key")).job_id == taken.job_id
        with pytest.raises(DuplicateJob):
            await producer.submit("theirs", job_id="taken")


async def test_what_a_producer_can_do_to_others_and_that_it_cannot_steer_the_queue(acl_server, narrowed):
    keys = Keys(narrowed)
    async with AsyncClient(acl_server.url("producer", narrowed), queue=narrowed) as client:
        job = await client.submit("a prompt")
    with Redis.from_url(acl_server.url("producer", narrowed)) as redis:
        [(entry, fields)] = redis.xrange(keys.jobs("normal"))
        assert b"a prompt" in fields[b"job"]
        redis.xadd(keys.tokens(job.job_id), {"event": b"forged"}, id="1-0")
        redis.xadd(keys.replies("r"), {"event": b"forged"})
        assert redis.spublish(keys.channel(job.job_id), b"forged") == 0
        assert redis.xdel(keys.jobs("normal"), entry) == 1
        for call in ("'HSET', KEYS[1], 'paused', 1", "'HSET', KEYS[1], 'drain:w', 1", "'DEL', KEYS[1]"):
            digest = redis.script_load(f"return redis.call({call})")
            with pytest.raises(RedisError, match=REFUSED):
                redis.evalsha(digest, 1, keys.settings)
        for queue_key in (keys.workers, keys.models, keys.dead, keys.fair("low"), keys.job(job.job_id)):
            digest = redis.script_load("return redis.call('DEL', KEYS[1])")
            with pytest.raises(RedisError, match=REFUSED):
                redis.evalsha(digest, 1, queue_key)


async def test_what_an_operator_can_do_beside_its_work(acl_server, narrowed):
    keys = Keys(narrowed)
    async with AsyncClient(acl_server.url("producer", narrowed), queue=narrowed) as client:
        await client.submit("a prompt")
    with Redis.from_url(acl_server.url("operator", narrowed)) as redis:
        assert b"a prompt" in redis.xrange(keys.jobs("normal"))[0][1][b"job"]
        assert redis.xadd(keys.jobs("normal"), {"job": b"a job by hand"})
        with pytest.raises(NoPermissionError):
            redis.hset(keys.job("any"), "cancel", 1)


def test_the_log_of_the_server_says_who_tried_what(acl_server, narrowed):
    user = f"{narrowed}-consumer"
    with Redis.from_url(acl_server.url("consumer", narrowed)) as redis, pytest.raises(NoPermissionError):
        redis.xrange(Keys("another").tokens("a"))
    tried = {entry["object"] for entry in acl_server.admin.acl_log(128) if entry["username"] == user}
    assert tried - OF_THE_HANDSHAKE == {Keys("another").tokens("a")}


def test_for_all_queues_a_name_can_make_a_key_pass_for_another_and_for_one_queue_none_can(
    acl_server, narrowed
):
    call = ["XRANGE", Keys(narrowed).replies("x}:dead"), "-", "+"]
    dry_run = [
        acl_server.admin.execute_command("ACL", "DRYRUN", user, *call)
        for user in ("ingine-operator", f"{narrowed}-operator")
    ]
    assert dry_run[0] == b"OK" and b"no permissions" in dry_run[1]


def test_a_queue_named_like_a_partition_has_the_keys_of_that_partition():
    assert Keys("a.1").job("x") == Keys("a", 1).job("x")
