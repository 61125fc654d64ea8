"""Garbage in any place of a queue that is served: what it concerns ends, all else is as without it.

Which values go where is drawn by a fixed seed; what a test asserts holds whenever the worker meets them.
"""

import random
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress

import msgpack
import pytest
from redis.exceptions import ResponseError

from ingine.contract.events import TerminalEvent, TokensEvent, encode_event
from ingine.contract.jobs import Job, encode_job
from ingine.contract.keys import Priority
from ingine.contract.record import JobStatus
from ingine.errors import ClientError
from ingine.producer import AsyncClient
from tests.waiting import wait_until_async
from tests.worker.conftest import Harness
from tests.worker.test_worker import alone

GREATEST_ID = f"{2**64 - 1}-{2**64 - 1}"
NASTY = [
    *(
        "",
        "abc",
        "-5",
        "1.5",
        "nan",
        "-nan",
        "inf",
        "-inf",
        "1e999",
        "01",
        "0x10",
        "+1",
        " 1",
        "1 ",
        "\u0661",
    ),
    *("9" * 25, "9" * 5000, str(2**53), str(2**63 - 1), str(2**63), str(2**64), "x" * 10_000),
    *(
        "0",
        "1",
        "7",
        b"\xff",
        b"\x00",
        "finished",
        "queued",
        "running",
        "delayed",
        "high",
        "w0",
        "1-1",
        GREATEST_ID,
    ),
]
FIELDS = [
    *(
        "status",
        "position",
        "attempt",
        "deaths",
        "cancel",
        "worker",
        "entry",
        "model",
        "priority",
        "reply_to",
    ),
    *("idempotency_key", "submission", "submitted_at", "began_at", "first_token_at", "finished_at", "bytes"),
    *("lease_ms", "deadline_at", "raw", "tenant", "cost", "\xff"),
]
SAMPLING = {"temperature": 0, "max_tokens": 60, "ignore_eos": True}
AT_ONCE = 6
"""Jobs that garbage is written for, beside two others: as many as the worker takes."""


@pytest.fixture
async def queue_of(harness, tiny_engine, redis_url, queue):
    """A worker, a client, and what the innocent jobs' output is to be."""
    expected, _ = alone(tiny_engine(), Job(id="x", prompt="innocent", sampling=SAMPLING))
    async with AsyncClient(redis_url, queue=queue) as client:
        yield await harness(lease_s=1.0), client, expected


async def is_exact(worker: Harness, job_id: str, expected: list[int]) -> None:
    *events, end = await worker.events(job_id)
    assert [token_id for event in events for token_id in event.token_ids] == expected
    assert end.status is JobStatus.FINISHED


async def nothing_waits(worker: Harness) -> bool:
    lengths = [await worker.redis.xlen(stream) for stream in worker.keys.all_jobs]
    # A member that is due at the end of time is no job, and in nobody's way.
    within_a_day = 1000 * (time.time() + 86_400)
    return not any(lengths) and not await worker.redis.zcount(worker.keys.delayed, "-inf", within_a_day)


async def all_has_ended(worker: Harness) -> None:
    """Each entry is gone, so each job has ended, or lies in the dead letters; and the worker lives."""
    await wait_until_async(lambda: nothing_waits(worker), what="the end of all jobs")
    assert not worker.running.done()


# ------------------------------------------------------------------------------------- in a record


def drawn(values_each: int) -> Iterator[tuple[str, str | bytes]]:
    dice = random.Random(values_each)
    pairs = [(field, value) for field in FIELDS for value in dice.sample(NASTY, values_each)]
    dice.shuffle(pairs)
    return pairs


@pytest.mark.parametrize("values_each", [2, pytest.param(10, marks=pytest.mark.wide)])
@pytest.mark.parametrize("when", ["before", "running"])
async def test_in_a_record(queue_of, values_each, when):
    worker, client, expected = queue_of
    redis, keys, pairs = worker.redis, worker.keys, drawn(values_each)
    for start in range(0, len(pairs), AT_ONCE):
        victims = {f"bad-{start}-{n}": pair for n, pair in enumerate(pairs[start : start + AT_ONCE])}
        if when == "before":
            await client.pause()
            await wait_until_async(lambda: worker.worker._partitions[0].intake.paused, what="the pause")
        for job_id in victims:
            options = {"reply_to": "batch", "idempotency_key": job_id, "deadline_s": 3600}
            await client.submit("victim", job_id=job_id, sampling=SAMPLING, **options)
        innocents = [f"good-{start}-{n}" for n in range(2)]
        for job_id in innocents:
            await client.submit("innocent", job_id=job_id, sampling=SAMPLING)
        for job_id, (field, value) in victims.items():
            if when == "running":
                await wait_until_async(lambda: redis.exists(keys.tokens(job_id)), what="tokens")  # noqa: B023
            await redis.hset(keys.job(job_id), field.encode("latin-1"), value)
        await client.resume()
        for job_id in innocents:
            await is_exact(worker, job_id, expected)
        await all_has_ended(worker)


# --------------------------------------------------------------------------------------- elsewhere

Attack = Callable[[Harness], Awaitable[None]]
NO_NUMBERS = [
    value for value in NASTY if value not in ("1.5", "01", "+1", " 1", "1 ", "\u0661", "0", "1", "7")
]


def settings_hash(worker: Harness, dice: random.Random) -> list:
    names = [
        "partitions",
        "max_jobs",
        "max_job_bytes",
        "max_bytes",
        "max_jobs_per_s",
        "weight:",
        "weight:t",
        "paused",
    ]
    values = [value for value in NO_NUMBERS if not str(value).isdigit()]
    return [
        ("hset", worker.keys.settings, name, dice.choice(values))
        for name in [*names, "model", "drain:", b"\xff"]
    ]


def other_hashes(worker: Harness, dice: random.Random) -> list:
    beats = [{"at_s": float("nan")}, {"at_s": "x"}, {"at_s": 2**64 - 1, "fingerprint": 1}, [1], 7, None]
    calls = [("hset", worker.keys.workers, f"w{n}", msgpack.packb(beat)) for n, beat in enumerate(beats)]
    for name in (worker.keys.workers, worker.keys.models):
        calls += [("hset", name, dice.choice(NASTY), dice.choice(NASTY)) for _ in range(4)]
    return calls


def zsets(worker: Harness, dice: random.Random) -> list:
    keys = worker.keys
    names = [keys.delayed, keys.deadlines, *map(keys.fair, Priority), *map(keys.ends, Priority)]
    members = [*NASTY, "now", "tenant:", "good-0", "99-99", "0-0"]
    scores = ["inf", "-inf", "1e300", "0", "-1"]
    return [("zadd", name, dice.choice(scores), dice.choice(members)) for name in names for _ in range(3)]


def strings(worker: Harness, dice: random.Random) -> list:
    keys = worker.keys
    names = [keys.bytes, keys.rate(""), keys.idem("k"), keys.idem("")]
    return [("set", name, dice.choice(NO_NUMBERS)) for name in names]


def streams(worker: Harness, dice: random.Random) -> list:
    keys, raw = worker.keys, encode_job(Job(id="good-0", prompt="x"))
    event = encode_event(TerminalEvent(3, JobStatus.FINISHED, "good-0"))
    calls = [("xadd", stream, "*", "job", dice.choice(NASTY)) for stream in keys.all_jobs]
    calls += [("xadd", stream, "*", dice.choice(NASTY), dice.choice(NASTY)) for stream in keys.all_jobs]
    calls += [
        ("xadd", stream, "*", "job", raw, "cost", "inf", "tenant", "x" * 999) for stream in keys.all_jobs
    ]
    calls += [("xadd", keys.replies("batch"), "*", "event", event, "expires_at", dice.choice(NASTY))]
    calls += [("xadd", keys.replies("batch"), GREATEST_ID, "x", "y")]
    calls += [("xadd", keys.tokens(job_id), "0-1", "event", event) for job_id in ("later", "unknown")]
    return calls


def channels(worker: Harness, dice: random.Random) -> list:
    tokens = encode_event(TokensEvent(1, [65], "A"))
    commands = [{"command": "cancel", "job_id": "good-0"}, {"command": "released"}, {"command": []}, [], None]
    calls = [("spublish", worker.keys.control, msgpack.packb(command)) for command in commands]
    calls += [("spublish", worker.keys.control, dice.choice(NASTY)) for _ in range(4)]
    return [*calls, ("spublish", worker.keys.channel("good-0"), tokens)]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.wide) for seed in range(1, 8))])
async def test_anywhere_else(queue_of, seed):
    """This includes keys that producers may not write under the documented rights."""
    worker, client, expected = queue_of
    dice = random.Random(seed)
    kinds = [settings_hash, other_hashes, zsets, strings, streams, channels]
    calls = [call for kind in kinds for call in kind(worker, dice)]
    dice.shuffle(calls)
    for number, start in enumerate(range(0, len(calls), 10)):
        job_ids = [f"good-{2 * number + n}" for n in range(2)]
        await submit(worker, client, job_ids[0])
        for call in calls[start : start + 10]:
            with suppress(ResponseError):  # where an earlier one has used up a stream's ids
                await worker.redis.execute_command(*call)
        await submit(worker, client, job_ids[1])
        for job_id in job_ids:
            await is_exact(worker, job_id, expected)
    await all_has_ended(worker)


async def submit(worker: Harness, client: AsyncClient, job_id: str) -> None:
    """Submit as a producer with a library does, or as one without."""
    try:
        await client.submit("innocent", job_id=job_id, sampling=SAMPLING, idempotency_key=f"key-{job_id}")
    except ClientError:
        await worker.push(Job(id=job_id, prompt="innocent", sampling=SAMPLING))


# ------------------------------------------------------------------------------------ another type


async def replace(worker: Harness, name: str, kind: str) -> None:
    async with worker.redis.pipeline(transaction=True) as pipe:  # before the worker makes it anew
        await pipe.delete(name).execute_command(kind, name, "x")
        await pipe.execute()


@pytest.mark.parametrize("kind", ["set", pytest.param("rpush", marks=pytest.mark.wide)])
async def test_another_type_under_each_key(queue_of, kind, caplog):
    worker, client, expected = queue_of
    keys = worker.keys
    queue_keys = [
        *(
            keys.fair("normal"),
            keys.ends("normal"),
            keys.delayed,
            keys.deadlines,
            keys.settings,
            keys.workers,
        ),
        *(keys.models, keys.bytes, keys.dead, keys.replies("batch"), keys.idem("key-0"), keys.rate("")),
        *(keys.jobs("high"), keys.jobs("low")),
    ]
    for number, name in enumerate(queue_keys):
        job_ids = [f"good-{number}-{n}" for n in range(2)]
        await client.submit(
            "innocent", job_id=job_ids[0], sampling=SAMPLING, reply_to="batch", deadline_s=3600
        )
        await wait_until_async(lambda: worker.redis.exists(keys.tokens(job_ids[0])), what="tokens")  # noqa: B023
        await replace(worker, name, kind)
        await submit(worker, client, job_ids[1])
        for job_id in job_ids:
            await is_exact(worker, job_id, expected)
        await worker.redis.delete(name)
    await all_has_ended(worker)


async def test_another_type_under_the_stream_of_jobs_that_run(queue_of, caplog):
    """They end as they would. Other priorities are served, and this one once there is a stream again."""
    worker, client, expected = queue_of
    stream = worker.keys.jobs("normal")
    await client.submit("innocent", job_id="runs", sampling=SAMPLING)
    await wait_until_async(lambda: worker.redis.exists(worker.keys.tokens("runs")), what="tokens")
    await replace(worker, stream, "set")
    with pytest.raises(ClientError):
        await client.submit("innocent", job_id="refused", sampling=SAMPLING)
    for priority in ("high", "low"):
        await client.submit("innocent", job_id=priority, priority=priority, sampling=SAMPLING)
    for job_id in ("runs", "high", "low"):
        await is_exact(worker, job_id, expected)
    assert "jobs stream not served" in caplog.text
    await worker.redis.delete(stream)
    worker.worker._partitions[0].intake._next_adoption = 0.0  # or in ten seconds
    await client.submit("innocent", job_id="later", sampling=SAMPLING)
    await is_exact(worker, "later", expected)
    await all_has_ended(worker)
