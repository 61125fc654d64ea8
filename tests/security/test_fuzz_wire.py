"""Hostile bytes at every decoder: for any input, the result is a value or the documented error.

`benchmarks/fuzz_wire.py` runs the same properties for any length of time.
"""

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ingine.contract.chat import Message
from ingine.contract.events import encode_event
from ingine.contract.faults import MAX_MAP_ENTRIES, explain
from ingine.contract.jobs import Job, decode_job, encode_job
from ingine.errors import ErrorCode, InvalidJob
from ingine.sampling_params import SamplingParams
from ingine.worker.control import COMMANDS, ControlListener
from tests.security import wire_properties as properties
from tests.security.wire_properties import CANARY, FULL_JOB, at, packed

JOB_FIELDS = [(name,) for name in Job.model_fields]
SAMPLING_FIELDS = [("sampling", name) for name in SamplingParams.model_fields]
MESSAGE_FIELDS = [("messages", 0, name) for name in Message.model_fields]
FIELDS = [*JOB_FIELDS, *SAMPLING_FIELDS, *MESSAGE_FIELDS, ("metadata", "key"), ("sampling", "logit_bias", 7)]

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.sampled_from([2**31 - 1, 2**31, 2**53, 2**63 - 1, 2**64 - 1, -1, 0])
    | st.floats()
    | st.text(max_size=8)
    | st.binary(max_size=8)
    | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=8))
    | st.builds(msgpack.Timestamp, st.integers(0, 2**34 - 1), st.integers(0, 10**9 - 1))
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(scalars, inner, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=300) | st.binary(max_size=40).map(lambda end: packed(FULL_JOB)[:-20] + end))
def test_no_bytes_get_anything_else_out_of_the_decoder(raw):
    properties.check_job(raw)
    properties.check_event(raw)


@given(values)
def test_no_value_does(value):
    properties.check_job(packed(value))
    properties.check_event(packed(value))


@given(st.data())
def test_no_damage_to_a_valid_job_does(data):
    raw = bytearray(packed(FULL_JOB))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(raw) - 1))
        raw[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    properties.check_job(bytes(raw))


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
@settings(max_examples=30)
@given(value=values)
def test_no_value_of_any_one_field_does(path, value):
    properties.check_job(packed(at(FULL_JOB, path, value)))


TEXTS = [
    *(path for path in MESSAGE_FIELDS if path[-1] != "tool_calls"),
    *((name,) for name in ("id", "prompt", "tenant", "reply_to", "model", "trace")),
]
VALID = {
    **{path: [CANARY] for path in TEXTS},
    ("sampling", "stop"): [CANARY, [CANARY]],
    ("sampling", "bad_words"): [[CANARY]],
    ("metadata",): [{"name": CANARY}],
    ("metadata", "key"): [CANARY, [CANARY], {"name": CANARY}, CANARY.encode()],
}


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
@pytest.mark.parametrize("value", [CANARY, [CANARY], {"name": CANARY}, CANARY.encode()], ids=repr)
def test_a_value_is_taken_or_refused_and_no_refusal_quotes_it(path, value):
    raw = packed(at(FULL_JOB, path, value))
    if value in VALID.get(path, []):
        assert CANARY.encode() in encode_job(decode_job(raw))
    else:
        with pytest.raises(InvalidJob) as refused:
            decode_job(raw)
        assert CANARY not in str(refused.value)


@given(st.sampled_from(FIELDS), values)
def test_every_fault_is_told_with_a_code(path, value):
    try:
        Job.model_validate(at(FULL_JOB, path, value))
    except ValidationError as error:
        code, message = explain(error)
        assert code in ErrorCode and message


@given(
    st.builds(
        Job,
        id=st.from_regex(r"[A-Za-z0-9_.:-]{1,128}", fullmatch=True),
        prompt=st.text() | st.lists(st.integers(0, 2**31 - 1)).map(tuple),
        sampling=st.builds(
            SamplingParams,
            temperature=st.floats(0, 100),
            top_p=st.floats(0.001, 1),
            seed=st.none() | st.integers(0, 2**63 - 1),
            stop=st.lists(st.text(min_size=1), max_size=16).map(tuple),
            logit_bias=st.none()
            | st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=5),
        ),
        deadline_ms=st.none() | st.integers(1, 2**53 - 1),
        metadata=st.none()
        | st.dictionaries(st.text(), st.integers(-(2**63), 2**64 - 1) | st.text(), max_size=5),
    )
)
def test_a_valid_job_comes_back_as_it_went(job):
    assert decode_job(encode_job(job)) == job


ATOMS = {
    "empty lists": b"\x90",
    "empty maps": b"\x80",
    "lists of one": b"\x91\xc0",
    "maps of one": b"\x81\x01\xc0",
    "extensions": b"\xd4\x05\x00",
    "timestamps": b"\xd6\xff\x00\x00\x00\x01",
    "floats": b"\xca\x00\x00\x00\x01",
    "strings": b"\xa2\xc3\xa9",
    "nothing": b"\xc0",
    "messages": packed({"role": "a", "content": "b"}),
}
SIZE = 1 << 15


@pytest.mark.parametrize("path", FIELDS, ids=lambda path: ".".join(map(str, path)))
@pytest.mark.parametrize("atom", ATOMS)
def test_memory_is_bounded_by_the_size_of_the_job(path, atom):
    """The job has a large array of one small value, at every place."""
    count = SIZE // len(ATOMS[atom])
    mark = "place of the array"
    array = b"\xdd" + count.to_bytes(4, "big") + ATOMS[atom] * count
    properties.check_peak(packed(at(FULL_JOB, path, mark)).replace(packed(mark), array))


@pytest.mark.parametrize("path", [(), ("metadata",), ("sampling",), ("sampling", "logit_bias"), ("prompt",)])
def test_no_map_is_built_that_a_sender_can_make_slow(path):
    """Integers hash to themselves: colliding keys make the cost of a map with n entries n * n."""
    large = {n << 20: 0 for n in range(MAX_MAP_ENTRIES + 1)}
    job = {**FULL_JOB, **large} if not path else at(FULL_JOB, path, large)
    with pytest.raises(InvalidJob, match=rf"{MAX_MAP_ENTRIES} is the limit") as caught:
        decode_job(packed(job))
    assert (caught.value.code, caught.value.job_id) == (ErrorCode.INVALID_SHAPE, FULL_JOB["id"])


def test_the_largest_map_is_accepted():
    largest = {n: 0 for n in range(MAX_MAP_ENTRIES)}
    assert decode_job(packed(at(FULL_JOB, ("metadata", "key"), largest))).metadata["key"] == largest


@given(properties.events())
def test_an_event_comes_back_as_it_went(event):
    assert properties.check_event(encode_event(event)) == event


@given(values, st.sampled_from(["delta", "message"]), st.sampled_from([(), ("tool_calls",), ("content",)]))
def test_no_value_of_a_message_gets_anything_else_out_of_the_decoder(value, name, path):
    for step in reversed(path):
        value = {"role": "assistant", step: value}
    properties.check_event(packed({"type": "finished", "position": 1, "job_id": "a", name: value}))


@pytest.mark.parametrize(
    "fields",
    [
        {"type": "tokens", "position": "1", "token_ids": [1], "text": ""},
        {"type": "tokens", "position": 0, "token_ids": [1], "text": ""},
        {"type": "tokens", "position": 1, "token_ids": 1, "text": ""},
        {"type": "tokens", "position": 1, "token_ids": ["x"], "text": ""},
        {"type": "tokens", "position": 1, "token_ids": [-1], "text": ""},
        {"type": "tokens", "position": 1, "token_ids": [1], "text": None},
        {"type": "tokens", "position": 1, "token_ids": [1], "text": "", "logprobs": 1},
        {"type": "running", "position": 1, "job_id": "a"},
        {"type": "failed", "position": 1, "job_id": "a", "error": "x"},
        {"type": "finished", "position": -1, "job_id": "a"},
        {"type": "finished", "position": 1, "job_id": ""},
        {"type": "tokens", "position": True, "token_ids": [1], "text": ""},
        {"type": "tokens", "position": 1, "token_ids": [True], "text": ""},
        {"type": "finished", "position": True, "job_id": "a"},
        {"type": "finished", "position": 1, "job_id": 5},
        {"type": "finished", "position": 1, "job_id": "a", "text": b"a"},
        {"type": "finished", "position": 1, "job_id": "a", "finish_reason": 1},
        {"type": "finished", "position": 1, "job_id": "a", "metadata": [1]},
        {"type": "finished", "position": 1, "job_id": "a", "timings": 1},
        {"type": "finished", "position": 1, "job_id": "a", "usage": {"num_output_tokens": "1"}},
        {"type": "failed", "position": 1, "job_id": "a", "error": {"code": 1}},
        {"type": "finished", "position": 1, "job_id": "a", "status": "failed"},
        *(
            {"type": "tokens", "position": 1, "token_ids": [1], "text": "", "logprobs": logprobs}
            for logprobs in (
                *([], [1], [{}], [{"token_id": 1, "logprob": "x", "top": []}]),
                [{"token_id": 1, "logprob": -1.0, "top": [[1]]}],
                [{"token_id": 1, "logprob": -1.0, "top": [], "bytes": 10**9}],
                [{"token_id": 1, "logprob": -1.0, "top": [], "bytes": [256]}],
                [{"token_id": 1, "logprob": -1.0, "top": [], "top_bytes": [5]}],
            )
        ),
    ],
    ids=str,
)
def test_what_only_looks_like_an_event_is_none(fields):
    assert properties.check_event(packed(fields)) is None


def listener() -> ControlListener:
    return ControlListener(None, None, runs=lambda _: True, obey=None)


@given(
    st.binary(max_size=64)
    | values.map(packed)
    | values.map(lambda value: packed({"command": value}))
    | values.map(lambda value: packed({"command": "cancel", "job_id": value}))
)
def test_nothing_on_the_control_channel_breaks_it(raw):
    control = listener()
    control._receive(raw)
    assert control._commands <= COMMANDS
    assert all(type(job_id) is str for job_id in control._cancelled)


def test_a_control_message_of_any_size_is_not_unpacked():
    control = listener()
    control._receive(packed({"command": "cancel", "job_id": "x" * 2000}))
    assert not control._cancelled
