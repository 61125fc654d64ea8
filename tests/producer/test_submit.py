"""Submitting: what is accepted, what is refused, and that the outcome is never in doubt."""

import asyncio

import msgpack
import pytest
from redis.asyncio import Redis

from ingine.contract.events import decode_event
from ingine.contract.jobs import EXPECTED_OUTPUT_TOKENS, MAX_TOKEN_COST, Job, decode_job
from ingine.contract.keys import Keys
from ingine.contract.record import JobStatus
from ingine.producer import (
    AsyncClient,
    DuplicateJob,
    ErrorCode,
    InvalidJob,
    JobNotFound,
    QueueFull,
    SamplingParams,
)
from tests.producer.conftest import Face
from tests.producer.fake_worker import FakeWorker
from tests.waiting import HANGS_S


async def queued_jobs(redis: Redis, keys: Keys) -> list[Job]:
    entries = [entry for jobs in keys.all_jobs for entry in await redis.xrange(jobs)]
    return [decode_job(fields[b"job"]) for _, fields in entries]


async def test_a_submitted_job_is_in_its_stream_as_it_was_given(face: Face, redis: Redis, keys: Keys):
    handle = await face(
        "submit",
        messages=[{"role": "user", "content": "hi"}],
        sampling=SamplingParams(max_tokens=7, stop=("x",)),
        priority="high",
        deadline_s=1.5,
        reply_to="me",
        metadata={"row": 3},
        tenant="acme",
        model="m",
        stream=False,
        trace="00-1-2-3",
    )

    [(_, fields)] = await redis.xrange(keys.jobs("high"))
    job = decode_job(fields[b"job"])
    assert job.id == handle.job_id
    assert job.messages[0].content == "hi"
    assert (job.sampling.max_tokens, job.sampling.stop) == (7, ("x",))
    assert (job.deadline_ms, job.reply_to, job.metadata) == (1500, "me", {"row": 3})
    assert (job.tenant, job.model, job.stream, job.trace) == ("acme", "m", False, "00-1-2-3")


@pytest.mark.parametrize("prompt", ["some text", [1, 2, 3], (1, 2, 3)])
async def test_a_prompt_is_text_or_token_ids(client: AsyncClient, redis: Redis, keys: Keys, prompt):
    await client.submit(prompt)
    [job] = await queued_jobs(redis, keys)
    assert job.prompt == (prompt if isinstance(prompt, str) else tuple(prompt))


@pytest.mark.parametrize(
    "sampling",
    [{"sampling": {"max_tokens": 5, "logit_bias": {3: -1.0}}}, {"max_tokens": 5, "logit_bias": {3: -1}}],
)
async def test_sampling_is_a_dict_or_keywords(client: AsyncClient, redis: Redis, keys: Keys, sampling):
    await client.submit("hi", **sampling)
    [job] = await queued_jobs(redis, keys)
    assert job.sampling == SamplingParams(max_tokens=5, logit_bias={3: -1.0})


async def test_what_was_set_is_sent_and_nothing_else(client: AsyncClient, redis: Redis, keys: Keys):
    """Fields are sent even at their default, however they were given. The model decides the others."""
    for sampling in ({"temperature": 1.0, "n": 1, "stop": None}, SamplingParams(temperature=1.0, n=1)):
        await client.submit("hi", sampling=sampling)
    await client.submit("hi", temperature=1.0, n=1, max_tokens=None, best_of=1)
    await client.submit("hi")
    given = [job.sampling.given() for job in await queued_jobs(redis, keys)]
    assert given == [{"temperature": 1.0}] * 3 + [{}]


@pytest.mark.parametrize(
    ("arguments", "cost"),
    [
        ({"prompt": [1] * 100, "max_tokens": 7}, 107),
        ({"prompt": [1] * 100}, 100 + EXPECTED_OUTPUT_TOKENS),
        ({"prompt": "x" * 400, "max_tokens": 7}, 107),
        ({"prompt": "字" * 400, "max_tokens": 7}, 307),  # a token holds fewer characters of it
        ({"messages": [{"role": "user", "content": "x" * 200}] * 2, "max_tokens": 7}, 107),
        ({"prompt": [1], "max_tokens": 10**9}, MAX_TOKEN_COST),
        ({"prompt": [1], "max_tokens": 2**64 - 1}, MAX_TOKEN_COST),
        ({"prompt": [1] * 100, "max_tokens": 7, "n": 8}, 100 + 8 * 7),
        ({"prompt": [1], "max_tokens": 10**9, "n": 8}, 8 * MAX_TOKEN_COST),
    ],
)
async def test_a_job_is_charged_with_what_it_may_take(
    client: AsyncClient, redis: Redis, keys: Keys, arguments, cost
):
    await client.submit(**arguments)
    [(_, fields)] = await redis.xrange(keys.jobs("normal"))
    assert int(fields[b"cost"]) == cost


@pytest.mark.parametrize(
    ("arguments", "code", "named"),
    [
        ({}, ErrorCode.INVALID_SHAPE, "prompt"),
        (
            {"prompt": "a", "messages": [{"role": "user", "content": "b"}]},
            ErrorCode.INVALID_SHAPE,
            "messages",
        ),
        ({"prompt": [1, -1]}, ErrorCode.INVALID_TOKEN_ID, "prompt.1"),
        ({"prompt": 5}, ErrorCode.INVALID_TYPE, "prompt"),
        ({"prompt": object()}, ErrorCode.INVALID_TYPE, "msgpack"),
        ({"prompt": "\ud800"}, ErrorCode.INVALID_TYPE, "msgpack"),
        ({"messages": [{"role": "user"}]}, ErrorCode.INVALID_SHAPE, "messages.0.content"),
        ({"prompt": "a", "temperature": -1}, ErrorCode.INVALID_PARAMETER, "sampling.temperature"),
        ({"prompt": "a", "temperature": float("nan")}, ErrorCode.INVALID_PARAMETER, "sampling.temperature"),
        ({"prompt": "a", "best_of": 2}, ErrorCode.INVALID_PARAMETER, r"sampling\.best_of`: not supported"),
        ({"prompt": "a", "n": 0}, ErrorCode.INVALID_PARAMETER, r"sampling\.n`"),
        ({"prompt": "a", "sampling": {"temprature": 1}}, ErrorCode.UNKNOWN_FIELD, "sampling.temprature"),
        ({"prompt": "a", "priority": "urgent"}, ErrorCode.INVALID_PARAMETER, "priority"),
        ({"prompt": "a", "deadline_s": 0}, ErrorCode.INVALID_PARAMETER, "deadline_s"),
        ({"prompt": "a", "deadline_s": float("inf")}, ErrorCode.INVALID_PARAMETER, "deadline_s"),
        ({"prompt": "a", "idempotency_key": ""}, ErrorCode.INVALID_PARAMETER, "idempotency_key"),
        ({"prompt": "a", "job_id": "no spaces"}, ErrorCode.INVALID_PARAMETER, "id"),
        ({"prompt": "a", "reply_to": "a/b"}, ErrorCode.INVALID_PARAMETER, "reply_to"),
        ({"prompt": "a", "metadata": {"x": "y" * 20_000}}, ErrorCode.INVALID_SHAPE, "metadata"),
    ],
)
async def test_an_invalid_job_is_refused_before_anything_is_sent(
    client: AsyncClient, redis: Redis, keys: Keys, arguments, code, named
):
    with pytest.raises(InvalidJob, match=named) as refused:
        await client.submit(**arguments)
    assert refused.value.code == code
    assert await queued_jobs(redis, keys) == []


async def test_an_unknown_keyword_is_a_type_error_that_names_it(client: AsyncClient):
    with pytest.raises(TypeError, match="max_tokenz"):
        await client.submit("hi", max_tokenz=3)
    with pytest.raises(TypeError, match="seed"):
        await client.submit("hi", sampling={"max_tokens": 3}, seed=1)


async def test_a_full_queue_says_so_and_accepts_nothing(face: Face, redis: Redis, keys: Keys):
    await face("set_limits", max_jobs=1)
    await face("submit", "first")
    with pytest.raises(QueueFull, match="limit of 1 jobs"):
        await face("submit", "second", job_id="second")
    with pytest.raises(JobNotFound):
        await face("status", "second")
    assert len(await queued_jobs(redis, keys)) == 1


async def test_the_limit_is_exact_when_many_submit_at_once(client: AsyncClient, redis: Redis, keys: Keys):
    await client.set_limits(max_jobs=10)
    outcomes = await asyncio.gather(*(client.submit("x") for _ in range(30)), return_exceptions=True)
    assert sum(isinstance(outcome, QueueFull) for outcome in outcomes) == 20
    assert len(await queued_jobs(redis, keys)) == 10


async def test_a_job_over_the_size_limit_is_refused(face: Face, redis: Redis, keys: Keys):
    await face("set_limits", max_job_bytes=1000)
    with pytest.raises(InvalidJob, match="is 1000") as refused:
        await face("submit", "x" * 2000)
    assert refused.value.code == ErrorCode.JOB_TOO_LARGE
    assert await queued_jobs(redis, keys) == []


async def test_the_same_idempotency_key_is_the_same_job(face: Face, redis: Redis, keys: Keys):
    first = await face("submit", "pay me once", idempotency_key="order 7")
    second = await face("submit", "pay me once", idempotency_key="order 7")
    other = await face("submit", "pay me once", idempotency_key="order 8")
    assert first.job_id == second.job_id != other.job_id
    assert len(await queued_jobs(redis, keys)) == 2


async def test_a_job_id_is_taken_once(face: Face, redis: Redis, keys: Keys):
    await face("submit", "one", job_id="mine")
    with pytest.raises(DuplicateJob, match="mine"):
        await face("submit", "another", job_id="mine")
    assert len(await queued_jobs(redis, keys)) == 1


async def test_submit_many_keeps_the_order(face: Face, redis: Redis, keys: Keys):
    jobs = [{"prompt": f"{n}", "max_tokens": 3} for n in range(300)] + [Job(id="last", prompt="x")]
    handles = await face("submit_many", jobs)
    assert [handle.job_id for handle in handles] == [job.id for job in await queued_jobs(redis, keys)]
    assert handles[-1].job_id == "last"


async def test_submit_many_sends_nothing_if_one_is_invalid(face: Face, redis: Redis, keys: Keys):
    with pytest.raises(InvalidJob, match="max_tokens"):
        await face("submit_many", [{"prompt": "fine"}, {"prompt": "not", "max_tokens": 0}])
    assert await queued_jobs(redis, keys) == []


async def test_submit_many_says_what_was_accepted_when_the_queue_fills_up(
    face: Face, redis: Redis, keys: Keys
):
    await face("set_limits", max_jobs=3)
    with pytest.raises(QueueFull) as full:
        await face("submit_many", [{"prompt": "x", "job_id": f"job-{n}"} for n in range(600)])
    assert [handle.job_id for handle in full.value.accepted] == ["job-0", "job-1", "job-2"]
    assert len(await queued_jobs(redis, keys)) == 3


async def test_status_follows_the_job(face: Face, worker: FakeWorker):
    job_id = (await face("submit", "hi", priority="low", reply_to="me")).job_id
    info = await face("status", job_id)
    assert (info.status, info.priority, info.position, info.reply_to) == (JobStatus.QUEUED, "low", 0, "me")
    assert info.submitted_at_ms > 0
    await worker.take()
    await worker.commit(job_id, 0, 3)
    info = await face("status", job_id)
    assert (info.status, info.position, info.worker) == (JobStatus.RUNNING, 3, "fake")
    with pytest.raises(JobNotFound, match="nobody"):
        await face("status", "nobody")


async def test_a_queued_job_is_cancelled_at_once(face: Face, redis: Redis, keys: Keys):
    job_id = (await face("submit", "hi", reply_to="me", metadata={"row": 1})).job_id
    assert await face("cancel", job_id) == "cancelled"
    assert await face("cancel", job_id) == "cancelled"

    assert await queued_jobs(redis, keys) == []
    [(entry_id, fields)] = await redis.xrange(keys.tokens(job_id))
    end = decode_event(fields[b"event"])
    assert (entry_id, end.status, end.metadata) == (b"0-1", JobStatus.CANCELLED, {"row": 1})
    assert [reply[b"event"] for _, reply in await redis.xrange(keys.replies("me"))] == [fields[b"event"]]
    assert await redis.pttl(keys.tokens(job_id)) > 0


async def test_a_running_job_is_asked_to_stop(face: Face, worker: FakeWorker, redis: Redis, keys: Keys):
    job_id = (await face("submit", "hi")).job_id
    await worker.take()
    async with redis.pubsub() as pubsub:
        await pubsub.ssubscribe(keys.control)
        await pubsub.get_message(timeout=HANGS_S)
        assert await face("cancel", job_id) == "requested"
        nudge = await pubsub.get_message(timeout=HANGS_S)
    assert msgpack.unpackb(nudge["data"]) == {"command": "cancel", "job_id": job_id}
    assert (await face("status", job_id)).cancel_requested


async def test_cancel_says_how_a_job_had_ended(face: Face, worker: FakeWorker):
    job_id = (await face("submit", "hi")).job_id
    await worker.take()
    await worker.run(job_id, 2)
    assert await face("cancel", job_id) == "finished"
    with pytest.raises(JobNotFound):
        await face("cancel", "nobody")


async def test_a_cancelled_caller_does_not_cut_off_its_command(client: AsyncClient, redis: Redis, keys: Keys):
    await client.queue_info()  # it knows the partitions
    submitting = asyncio.create_task(client.submit("hi", job_id="mine"))
    for _ in range(3):  # as far as its command
        await asyncio.sleep(0)
    submitting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await submitting
    await asyncio.gather(*(client.submit("after") for _ in range(20)))
    assert sorted(job.prompt for job in await queued_jobs(redis, keys)) == ["after"] * 20 + ["hi"]
