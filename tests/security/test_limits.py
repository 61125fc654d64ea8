"""The table of limits in docs/security.md agrees with the code, each limit is exact, and nonsense stops no
worker."""

import pytest
from redis import Redis

from ingine import sampling_params, structured_outputs
from ingine.contract import chat, jobs
from ingine.contract import faults as job_faults
from ingine.contract.jobs import Job, decode_job, encode_job
from ingine.contract.keys import Keys
from ingine.errors import ErrorCode, InvalidJob
from ingine.producer import AsyncClient, JobNotFound, Result, submission
from ingine.worker import control
from tests.docs.tables import table
from tests.security.wire_properties import FULL_JOB, at, packed
from tests.waiting import wait_until_async

PLAIN = {"id": "a", "prompt": "x"}
IN_CODE = {
    "bytes of a job": jobs.DEFAULT_MAX_JOB_BYTES,
    "nesting of a job": job_faults.MAX_NESTING,
    "messages of a job": chat.MAX_MESSAGES,
    "maps and arrays of a job": job_faults.MAX_CONTAINERS,
    "entries of all maps of a job": job_faults.MAX_ENTRIES,
    "bytes of a field of a job but prompt and messages": job_faults.MAX_FIELD_BYTES,
    "fields of a job, of its sampling, of a message": job_faults.MAX_FIELDS,
    "entries of any map": job_faults.MAX_MAP_ENTRIES,
    "bytes of metadata": jobs.MAX_METADATA_BYTES,
    "stop strings": sampling_params.MAX_STOP_STRINGS,
    "characters of a stop string": sampling_params.MAX_STOP_CHARS,
    "stop token ids": sampling_params.MAX_STOP_TOKEN_IDS,
    "allowed token ids": sampling_params.MAX_ALLOWED_TOKEN_IDS,
    "bad words": sampling_params.MAX_BAD_WORDS,
    "characters of a bad word": sampling_params.MAX_BAD_WORD_CHARS,
    "biases": sampling_params.MAX_LOGIT_BIASES,
    "logprobs": sampling_params.MAX_LOGPROBS,
    "log probabilities of a prompt": sampling_params.MAX_PROMPT_LOGPROBS,
    "bytes of a schema, regex, grammar or all choices": structured_outputs.MAX_GRAMMAR_BYTES,
    "choices": structured_outputs.MAX_CHOICES,
    "characters of an id, tenant or reply_to": 128,
    "characters of model and trace": 256,
    "characters of an idempotency key": submission.MAX_IDEMPOTENCY_KEY,
    "jobs of a queue": jobs.DEFAULT_MAX_QUEUED_JOBS,
    "bytes of a queue": jobs.DEFAULT_MAX_QUEUED_BYTES,
    "jobs a second of a tenant": None,
    "bytes of a control message": control.MAX_NUDGE_BYTES,
}


def test_the_table_has_every_limit_with_its_number():
    rows = {row["what"]: row["limit"].replace(",", "") for row in table("docs/security.md", "Limits")}
    assert {name: int(limit) if limit.isdigit() else None for name, limit in rows.items()} == IN_CODE


def nested(levels: int) -> dict:
    """A job whose deepest container is at that level. The job itself is level 1."""
    value = []
    for _ in range(levels - 3):
        value = [value]
    return PLAIN | {"metadata": {"a": value}}


def metadata_of(num_bytes: int) -> dict:
    overhead = len(packed({"a": "x" * 1000})) - 1000
    return PLAIN | {"metadata": {"a": "x" * (num_bytes - overhead)}}


def sampling(**fields) -> dict:
    return PLAIN | {"sampling": fields}


AT_MOST = {
    "nesting": (nested, job_faults.MAX_NESTING, ErrorCode.NESTED_TOO_DEEP),
    "metadata": (metadata_of, jobs.MAX_METADATA_BYTES, ErrorCode.INVALID_SHAPE),
    "map": (
        lambda n: at(FULL_JOB, ("metadata", "key"), {i: 0 for i in range(n)}),
        job_faults.MAX_MAP_ENTRIES,
        ErrorCode.INVALID_SHAPE,
    ),
    "messages": (
        lambda n: {"id": "a", "messages": [{"role": "user", "content": "x"}] * n},
        chat.MAX_MESSAGES,
        ErrorCode.INVALID_PARAMETER,
    ),
    "stop": (
        lambda n: sampling(stop=["x"] * n),
        sampling_params.MAX_STOP_STRINGS,
        ErrorCode.INVALID_PARAMETER,
    ),
    "characters of a stop string": (
        lambda n: sampling(stop="x" * n),
        sampling_params.MAX_STOP_CHARS,
        ErrorCode.INVALID_PARAMETER,
    ),
    "stop token ids": (
        lambda n: sampling(stop_token_ids=[0] * n),
        sampling_params.MAX_STOP_TOKEN_IDS,
        ErrorCode.INVALID_PARAMETER,
    ),
    "allowed token ids": (
        lambda n: sampling(allowed_token_ids=[0] * n),
        sampling_params.MAX_ALLOWED_TOKEN_IDS,
        ErrorCode.INVALID_PARAMETER,
    ),
    "bad words": (
        lambda n: sampling(bad_words=["x"] * n),
        sampling_params.MAX_BAD_WORDS,
        ErrorCode.INVALID_PARAMETER,
    ),
    "characters of a bad word": (
        lambda n: sampling(bad_words=["x" * n]),
        sampling_params.MAX_BAD_WORD_CHARS,
        ErrorCode.INVALID_PARAMETER,
    ),
    "biases": (
        lambda n: sampling(logit_bias={i: 1.0 for i in range(n)}),
        sampling_params.MAX_LOGIT_BIASES,
        ErrorCode.INVALID_SHAPE,
    ),
    "logprobs": (lambda n: sampling(logprobs=n), sampling_params.MAX_LOGPROBS, ErrorCode.INVALID_PARAMETER),
    "id": (lambda n: PLAIN | {"id": "x" * n}, 128, ErrorCode.INVALID_PARAMETER),
    "tenant": (lambda n: PLAIN | {"tenant": "x" * n}, 128, ErrorCode.INVALID_PARAMETER),
    "reply_to": (lambda n: PLAIN | {"reply_to": "x" * n}, 128, ErrorCode.INVALID_PARAMETER),
    "model": (lambda n: PLAIN | {"model": "x" * n}, 256, ErrorCode.INVALID_PARAMETER),
    "trace": (lambda n: PLAIN | {"trace": "x" * n}, 256, ErrorCode.INVALID_PARAMETER),
}


@pytest.mark.parametrize("name", AT_MOST)
def test_a_job_at_its_limit_is_taken_and_one_over_it_is_not(name):
    make, limit, code = AT_MOST[name]
    decode_job(packed(make(limit)))
    with pytest.raises(InvalidJob) as caught:
        decode_job(packed(make(limit + 1)))
    assert caught.value.code == code


def test_the_size_of_a_job_is_exact():
    raw = packed(PLAIN)
    decode_job(raw, max_bytes=len(raw))
    with pytest.raises(InvalidJob, match=f"limit is {len(raw) - 1}") as caught:
        decode_job(raw, max_bytes=len(raw) - 1)
    assert caught.value.code == ErrorCode.JOB_TOO_LARGE


def test_a_map_of_too_many_fields_is_not_even_validated():
    many = {f"unknown-{number}": 1 for number in range(job_faults.MAX_FIELDS)}
    for job in (PLAIN | many, sampling(**many, more=1), PLAIN | {"messages": [many | {"more": 1}]}):
        with pytest.raises(InvalidJob, match="which no part of a job has"):
            decode_job(packed(job))


async def test_an_idempotency_key_has_an_end(redis_url, queue):
    async with AsyncClient(redis_url, queue=queue) as client:
        await client.submit("x", idempotency_key="k" * submission.MAX_IDEMPOTENCY_KEY)
        with pytest.raises(InvalidJob, match="idempotency_key"):
            await client.submit("x", idempotency_key="k" * (submission.MAX_IDEMPOTENCY_KEY + 1))


async def test_nonsense_in_the_keys_of_a_queue_stops_no_worker(redis_url, queue, run_worker):
    """A user who may submit may write to those keys, with the rights for the scripts."""
    keys, job = Keys(queue), Job(id="a", prompt="x", sampling={"temperature": 0, "max_tokens": 3})
    nonsense = {b"\xff": b"\xff", "max_job_bytes": b"\xfe", "weight:t": "nan", "weight:": "-1", "paused": "?"}
    with Redis.from_url(redis_url) as redis:
        redis.hset(keys.settings, mapping=nonsense)
        redis.hset(keys.workers, mapping={b"\xff": b"\xff", "w": b"\x90"})
        redis.xadd(keys.jobs("normal"), {"tenant": b"\xff", "cost": "-inf", "job": b"\xc1"})
        redis.xadd(keys.jobs("normal"), {"tenant": b"\xff" * 1000, "cost": "nan", "job": encode_job(job)})
        running = await run_worker(redis_url)
        for message in (b"\xff", b"\x81\xa7command\xa6cancel", b"x" * 100_000):
            redis.spublish(keys.control, message)
        async with AsyncClient(redis_url, queue=queue) as client:
            result = await result_of(client, "a")
    assert result.finish_reason == "length" and not running.done()


async def result_of(client: AsyncClient, job_id: str) -> Result:
    async def known() -> bool:
        try:
            return bool(await client.status(job_id))
        except JobNotFound:
            return False

    await wait_until_async(known, what="the worker's begin")
    return await client.attach(job_id).result()
