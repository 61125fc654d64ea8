"""Arguments of calls: accepted if the meaning is plain, else an error that names the argument."""

import uuid
from array import array
from collections import UserDict, deque
from datetime import timedelta
from types import MappingProxyType

import numpy as np
import pytest
import redis

from ingine.producer import AsyncClient, Client, ClientError, ConfigError, InvalidArgument, InvalidJob
from ingine.producer.submission import build_submission
from tests.producer.conftest import Face

WRONG_IN_SUBMIT = [
    ({"prompt": 3}, "prompt"),
    ({"prompt": b"bytes"}, "prompt"),
    ({"prompt": {1, 2}}, "prompt"),
    ({"prompt": [1.5]}, "prompt.0"),
    ({"prompt": ["a"]}, "prompt.0"),
    ({"prompt": [2**70]}, "prompt"),
    ({"messages": "hi"}, "messages"),
    ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content"),
    ({"messages": [{"content": "hi"}]}, "messages.0.role"),
    ({"prompt": "hi", "sampling": "greedy"}, "sampling"),
    ({"prompt": "hi", "sampling": []}, "sampling"),
    ({"prompt": "hi", "max_tokens": "7"}, "sampling.max_tokens"),
    ({"prompt": "hi", "temperature": -1}, "sampling.temperature"),
    ({"prompt": "hi", "stop": 3}, "sampling.stop"),
    ({"prompt": "hi", "logit_bias": {"a": 1}}, "sampling.logit_bias"),
    ({"prompt": "hi", "priority": 5}, "priority"),
    ({"prompt": "hi", "deadline_s": "3"}, "deadline_s"),
    ({"prompt": "hi", "deadline_s": True}, "deadline_s"),
    ({"prompt": "hi", "deadline_s": 1e300}, "deadline_s"),
    ({"prompt": "hi", "deadline_s": timedelta(0)}, "deadline_s"),
    ({"prompt": "hi", "not_before_s": Ellipsis}, "not_before_s"),
    ({"prompt": "hi", "deadline_s": 1, "not_before_s": 2}, "not_before_s lies behind deadline_s"),
    ({"prompt": "hi", "idempotency_key": 5}, "idempotency_key"),
    ({"prompt": "hi", "reply_to": 5}, "reply_to"),
    ({"prompt": "hi", "metadata": [1]}, "metadata"),
    ({"prompt": "hi", "metadata": {"a": Ellipsis}}, "metadata"),
    ({"prompt": "hi", "metadata": {1: "a"}}, "a key of `metadata`"),
    ({"prompt": "hi", "tenant": 3}, "tenant"),
    ({"prompt": "hi", "model": 3}, "model"),
    ({"prompt": "hi", "stream": "yes"}, "stream"),
    ({"prompt": "hi", "trace": 3}, "trace"),
    ({"prompt": "hi", "job_id": 5}, "`job_id`"),
    ({"prompt": "hi", "job_id": uuid.UUID(int=1)}, "`job_id`"),
    ({"prompt": "hi", "job_id": "no spaces"}, "`job_id`"),
    ({"prompt": "\ud800"}, "prompt"),
    ({}, "prompt"),
]
PYDANTICS = ("Input should", "should match", "valid dictionary", "valid tuple", "_ms", "`id`")


@pytest.mark.parametrize(("given", "named"), WRONG_IN_SUBMIT, ids=str)
def test_a_wrong_argument_is_named_in_our_words(given: dict, named: str):
    with pytest.raises(InvalidJob) as refused:
        build_submission(**given)
    assert isinstance(refused.value, ClientError)
    assert named in str(refused.value)
    assert not any(word in str(refused.value) for word in PYDANTICS), str(refused.value)


@pytest.mark.parametrize(
    ("jobs", "says"),
    [
        ([{"prompt": "hi", "colour": "red"}], "no argument 'colour'"),
        ([{"prompt": "hi", "sampling": {}, "top_k": 1}], "inside sampling="),
        (["hi"], "dicts of submit"),
        ({"prompt": "hi"}, "dicts of submit"),
        ([{1: 2}], "dicts of submit"),
        (3, "a list"),
    ],
    ids=str,
)
async def test_what_is_no_call_is_a_client_error_and_a_type_error(client: AsyncClient, jobs, says: str):
    for kind in (ClientError, TypeError, ValueError):
        with pytest.raises(kind, match=says) as wrong:
            await client.submit_many(jobs)
        assert wrong.value.accepted == ()
    assert (await client.queue_info()).waiting["normal"] == 0


@pytest.mark.parametrize(
    ("method", "args", "named"),
    [
        ("status", [5], "job_id"),
        ("status", ["\ud800"], "job_id"),
        ("cancel", [None], "job_id"),
        ("attach", [b"id"], "job_id"),
        ("attach", ["id", "3"], "from_position"),
        ("attach", ["id", -1], "from_position"),
        ("dead_letters", ["3"], "limit"),
        ("dead_letter", [5], "entry_id"),
        ("requeue", [5], "entry_id"),
        ("purge", ["1-1"], "entry_ids"),
        ("set_partitions", ["3"], "number"),
        ("set_partitions", [65], "64"),
    ],
)
async def test_other_calls_name_their_argument_too(face: Face, method: str, args: list, named: str):
    with pytest.raises(InvalidArgument, match=named):
        await face(method, *args) if method != "attach" else face._client.attach(*args)


async def test_what_is_no_entry_id_names_no_dead_letter(client: AsyncClient):
    for entry_id in ("x", "1-x", "", "0:1-1"):
        with pytest.raises(ClientError, match="no dead letter"):
            await client.dead_letter(entry_id)


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"max_jobs": "5"}, "max_jobs"),
        ({"max_bytes": 1.5}, "max_bytes"),
        ({"max_jobs_per_s": "5"}, "max_jobs_per_s"),
        ({"max_jobs_per_s": True}, "max_jobs_per_s"),
        ({"max_jobs_per_s": 10**400}, "max_jobs_per_s"),
        ({"max_jobs_per_s": np.array([1.0, 2.0])}, "max_jobs_per_s"),
        ({"weights": ["a"]}, "weights"),
        ({"weights": {5: 1}}, "5"),
        ({"weights": {"a": "1"}}, "tenant 'a'"),
        ({"weights": {"a": 10**400}}, "tenant 'a'"),
    ],
    ids=str,
)
async def test_limits_name_theirs(client: AsyncClient, limits: dict, named: str):
    with pytest.raises(InvalidArgument, match=named):
        await client.set_limits(**limits)


async def test_timeouts_and_positions(client: AsyncClient):
    job = await client.submit("hi")
    for timeout in ("5", [], True, 10**400, np.array([1.0, 2.0])):
        with pytest.raises(InvalidArgument, match="timeout"):
            await job.result(timeout)
    with pytest.raises(InvalidArgument, match="from_position"):
        await anext(job.stream("1"))
    for position in (3, "x", "1-1,x"):
        with pytest.raises(InvalidArgument, match="position"):
            await anext(client.replies("me", position))


def test_a_redis_client_that_does_not_await_is_refused():
    with pytest.raises(ConfigError, match=r"redis= must be a redis\.asyncio\.Redis"):
        Client(redis=redis.Redis())


SEQUENCES = [
    np.array([1, 2, 3]),
    range(1, 4),
    deque([1, 2, 3]),
    array("i", [1, 2, 3]),
    (1, np.int64(2), np.uint8(3)),
]


@pytest.mark.parametrize("ids", SEQUENCES, ids=lambda ids: type(ids).__name__)
def test_token_ids_of_any_sequence(ids):
    assert build_submission(ids).job.prompt == (1, 2, 3)


def test_numbers_of_numpy_and_durations_are_taken():
    submission = build_submission(
        np.str_("hi"),
        max_tokens=np.int64(7),
        temperature=np.float32(0.5),
        seed=np.uint32(3),
        ignore_eos=np.bool_(True),
        logit_bias={np.int64(5): np.float64(1.5)},
        stop=deque(["a"]),
        deadline_s=timedelta(minutes=2),
        not_before_s=np.float32(1.5),
        metadata=UserDict(row=np.int64(3), shape=np.array([2, 3])),
    )
    job = submission.job
    assert (job.prompt, job.deadline_ms, job.not_before_ms) == ("hi", 120_000, 1500)
    assert (job.sampling.max_tokens, job.sampling.temperature, job.sampling.seed) == (7, 0.5, 3)
    assert (job.sampling.ignore_eos, job.sampling.logit_bias, job.sampling.stop) == (True, {5: 1.5}, ("a",))
    assert job.metadata == {"row": 3, "shape": [2, 3]}


def test_logit_bias_with_the_keys_that_json_has():
    assert build_submission("hi", logit_bias={"50256": -100}).job.sampling.logit_bias == {50256: -100}
    sampling = MappingProxyType({"logit_bias": {"7": 1}})
    assert build_submission("hi", sampling=sampling).job.sampling.logit_bias == {7: 1}
