"""The contract's code: decoding reverses encoding, and no bytes can harm the decoder."""

import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ingine.contract.events import UNREADABLE, TerminalEvent, TokensEvent, decode_event, encode_event
from ingine.contract.faults import MAX_FIELD_BYTES
from ingine.contract.jobs import (
    EXPECTED_OUTPUT_TOKENS,
    MAX_TOKEN_COST,
    Job,
    decode_job,
    encode_job,
    token_cost,
)
from ingine.contract.keys import Keys
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode, InvalidJob
from ingine.sampling_params import SamplingParams

MIB = 1 << 20
MAX_CALLS = 100_000
"""Bound for 1 MiB, which may have as many elements: most are skipped in one call."""


MESSAGE = {"role": "u", "content": ""}


def job(**fields) -> bytes:
    return msgpack.packb({"id": "a", "prompt": "x"} | fields)


def calling(arguments: str) -> dict:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "tool_calls": [call]}


HEAVY = {
    "token ids out of range": job(prompt=[-1] * (MIB - 50)),
    "messages that are none": job(prompt=None, messages=[1] * (MIB - 50)),
    "messages of many fields": job(prompt=None, messages=[{str(i): 1 for i in range(100_000)}]),
    "stop strings that are none": job(sampling={"stop": [1] * (MIB - 50)}),
    "stop token ids that are none": job(sampling={"stop_token_ids": ["x"] * (MIB // 2 - 50)}),
    "biases that are none": job(sampling={"logit_bias": {i: "x" for i in range(100_000)}}),
    "unknown fields": job(**{str(i): 1 for i in range(100_000)}),
    "unknown sampling fields": job(sampling={str(i): 1 for i in range(100_000)}),
    "a long unknown field": job(**{"x" * (MIB - 50): 1}),
    "a wide metadata": job(metadata={"a": [[]] * (MIB - 50)}),
    "metadata of maps": job(metadata={"a": [{}] * (MIB - 50)}),
    "metadata of nothing": job(metadata={"a": [None] * (MIB - 50)}),
    "metadata of timestamps": job(metadata={"a": [msgpack.Timestamp(1)] * (MIB // 6 - 50)}),
    "an unknown field of lists": job(text=[[]] * (MIB - 50)),
    "a prompt of maps": job(prompt=[{}] * (MIB - 50)),
    "messages without content": job(prompt=None, messages=[MESSAGE] * (MIB // 17 - 9)),
    "messages without anything": job(prompt=None, messages=[{}] * (MIB - 50)),
    "parts that are none": job(prompt=None, messages=[{"role": "u", "content": [1] * (MIB - 99)}]),
    "calls that are none": job(prompt=None, messages=[{"role": "u", "tool_calls": [1] * (MIB - 99)}]),
    "calls of many fields": job(
        prompt=None, messages=[{"role": "u", "tool_calls": [{chr(i): 1 for i in range(65, 125)}] * 5700}]
    ),
    "arguments of many lists": job(prompt=None, messages=[calling(f"[{'[],' * (MIB // 3 - 99)}[]]")]),
    "arguments of many maps": job(prompt=None, messages=[calling('[{"":0},' + '{"":0},' * (MIB // 7 - 99))]),
    "arguments of one long string": job(prompt=None, messages=[calling('"' + "x" * (MIB - 200) + '"')]),
    "tools that are none": job(tools=[1] * (MIB - 99)),
    "tools of many fields": job(
        prompt=None, messages=[MESSAGE], tools=[{chr(i): 1 for i in range(65, 125)}] * 700
    ),
    "variables of nothing": job(chat_template_kwargs={"a": [None] * (MIB - 99)}),
    "messages of sixty fields": job(prompt=None, messages=[{chr(i): 1 for i in range(65, 125)}] * 5700),
}


@pytest.mark.parametrize("name", HEAVY)
def test_a_mebibyte_of_faults_costs_little(name):
    raw = HEAVY[name]
    assert len(raw) <= MIB
    tracemalloc.start()
    with pytest.raises(InvalidJob) as caught:
        decode_job(raw)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.job_id == "a"
    assert len(str(caught.value)) <= 500
    assert peak < 40 * MIB  # one fault object each would be over a gigabyte
    assert num_calls(decode_job, raw) <= MAX_CALLS


def num_calls(function: Callable, *arguments) -> int:
    """The number of calls of Python and C functions: a measure of work that is the same on every machine."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        with suppress(InvalidJob):
            function(*arguments)
    finally:
        sys.setprofile(None)
    return count


def test_the_id_is_found_where_it_lies_behind_too_much():
    much = [{}] * 9000
    raw = msgpack.packb({"v": 1, "messages": much, "reply_to": "r", "id": "a", "metadata": {"a": much}})
    with pytest.raises(InvalidJob, match="maps and arrays") as caught:
        decode_job(raw)
    assert (caught.value.code, caught.value.job_id, caught.value.reply_to) == ("invalid_shape", "a", "r")
    for damaged in (
        raw[:-5000],
        raw.replace(b"\xa2id", b"\x93id"),
        b"\x85" + b"\xc1" * 9,
        raw[: len(raw) // 2],
    ):
        with pytest.raises(InvalidJob):
            decode_job(damaged)


@pytest.mark.parametrize(
    "fields", [{"prompt": [1] * 100}, {"messages": [MESSAGE] * 100}], ids=["ids", "chat"]
)
def test_a_prompt_of_more_parts_than_the_model_takes_tokens_is_not_validated(fields):
    raw = msgpack.packb({"id": "a", **fields})
    decode_job(raw)
    decode_job(raw, max_num_tokens=101)
    with pytest.raises(InvalidJob) as caught:
        decode_job(raw, max_num_tokens=100)
    assert (caught.value.code, caught.value.job_id) == (ErrorCode.PROMPT_TOO_LONG, "a")


def test_of_a_prompt_that_is_too_long_no_token_is_built():
    raw = job(prompt=[30_000] * 340_000)
    tracemalloc.start()
    with pytest.raises(InvalidJob, match="the prompt has 340000 tokens; the most is 999") as caught:
        decode_job(raw, max_num_tokens=1000)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (caught.value.code, caught.value.job_id) == (ErrorCode.PROMPT_TOO_LONG, "a")
    assert peak < 6 * MIB  # a few times its bytes; as ints it has twelve


@pytest.mark.parametrize("field", ["metadata", "trace", "sampling", "text"])
def test_a_field_that_is_no_prompt_has_a_largest_size(field):
    overhead = len(msgpack.packb("x" * MAX_FIELD_BYTES)) - MAX_FIELD_BYTES
    with pytest.raises(InvalidJob) as taken:  # and refused for the right reason
        decode_job(job(**{field: "x" * (MAX_FIELD_BYTES - overhead)}))
    with pytest.raises(InvalidJob, match=f"a field of {MAX_FIELD_BYTES + 1} bytes") as refused:
        decode_job(job(**{field: "x" * (MAX_FIELD_BYTES - overhead + 1)}))
    assert f"`{field}`" in str(taken.value)
    assert (refused.value.code, refused.value.job_id) == (ErrorCode.INVALID_SHAPE, "a")


def test_a_conversation_has_a_limited_number_of_messages():
    with pytest.raises(InvalidJob, match="4096") as caught:
        decode_job(job(prompt=None, messages=[MESSAGE] * 4097))
    assert caught.value.code == ErrorCode.INVALID_PARAMETER
    assert len(decode_job(job(prompt=None, messages=[MESSAGE] * 4096)).messages) == 4096


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_decoder(raw):
    try:
        decode_job(raw)
    except InvalidJob as fault:
        assert fault.code in ErrorCode


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text() | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=12,
)


@given(st.dictionaries(st.sampled_from(sorted(Job.model_fields)), values))
def test_no_values_in_known_fields_crash_the_decoder(fields):
    try:
        decoded = decode_job(msgpack.packb(fields))
    except InvalidJob as fault:
        assert fault.code in ErrorCode
    else:
        assert decode_job(encode_job(decoded)) == decoded


@given(st.dictionaries(st.sampled_from(sorted(SamplingParams.model_fields)), values))
def test_no_values_in_sampling_crash_the_decoder(fields):
    try:
        decode_job(job(sampling=fields))
    except InvalidJob as fault:
        assert fault.code in ErrorCode and "sampling" in str(fault)


@pytest.mark.parametrize(
    ("raw", "says"),
    [
        (job(text="x"), "unknown field `text`"),
        (
            job(prompt=None, messages=[{"role": "user", "content": "x", "text": "y"}]),
            "unknown field `messages.0.text`",
        ),
        (job(prompt=[1, -7]), "`prompt.1`"),
        (job(prompt=5), "`prompt`"),
    ],
)
def test_the_message_names_the_field(raw, says):
    with pytest.raises(InvalidJob) as caught:
        decode_job(raw)
    assert says in str(caught.value)


def test_a_job_comes_back_as_it_went():
    sent = Job(
        id="a:b.c-d_1",
        messages=[{"role": "user", "content": "hé"}],
        sampling=SamplingParams(temperature=0, stop="x", logit_bias={3: 1.5}),
        priority="low",
        deadline_ms=5,
        metadata={"n": [1, {"x": None}]},
    )
    assert decode_job(encode_job(sent)) == sent


@pytest.mark.parametrize(
    "given",
    [{}, {"temperature": 1.0}, {"temperature": 1.0, "top_k": 0, "max_tokens": 7, "stop": ("x",)}],
    ids=repr,
)
def test_a_job_carries_what_was_set_and_nothing_else(given):
    """A set default is carried too; the model decides fields that are not set."""
    raw = encode_job(Job(id="a", prompt="x", sampling=SamplingParams(**given)))
    assert decode_job(raw).sampling.given() == given
    assert msgpack.unpackb(raw).get("sampling", {}).keys() == given.keys()
    assert encode_job(decode_job(raw)) == raw


def test_what_means_nothing_may_be_on_the_wire():
    sampling = {"n": 1, "stop": None, "max_tokens": None, "use_beam_search": False, "temperature": 0}
    assert decode_job(job(sampling=sampling)).sampling.given() == {"temperature": 0.0}


def test_what_is_not_supported_is_named():
    with pytest.raises(InvalidJob, match=r"`sampling\.best_of`: not supported") as caught:
        decode_job(job(sampling={"best_of": 2}))
    assert caught.value.code == ErrorCode.INVALID_PARAMETER


def test_the_cost_of_a_job_stays_sane():
    assert token_cost(10, 7) == 17
    assert token_cost(10, None) == 10 + EXPECTED_OUTPUT_TOKENS
    assert token_cost(10, 10**9) == token_cost(2**70, 2**64 - 1) == MAX_TOKEN_COST


@pytest.mark.parametrize(
    "event",
    [
        TokensEvent(3, [1, 2], "ab"),
        TokensEvent(1, [1], "", [{"token_id": 1, "logprob": -0.5, "top": [[1, -0.5]]}]),
        TokensEvent(1, [1], "", prompt_logprobs=[None, {"token_id": 1, "logprob": -0.5, "top": []}]),
        TerminalEvent(3, JobStatus.FINISHED, "a", "tail", "stop", usage={"num_output_tokens": 3}),
        TerminalEvent(1, JobStatus.FINISHED, "a", finish_reason="stop", stop_reason=0),
        TerminalEvent(1, JobStatus.FINISHED, "a", finish_reason="stop", stop_reason="x"),
        TerminalEvent(0, JobStatus.FAILED, "a", finish_reason="error", error={"code": "x", "message": "y"}),
    ],
)
def test_an_event_comes_back_as_it_went(event):
    assert decode_event(encode_event(event)) == event


def test_an_event_of_a_newer_worker_is_understood():
    raw = msgpack.packb({"type": "finished", "position": 1, "job_id": "a", "invented_later": [1]})
    assert decode_event(raw) == TerminalEvent(1, JobStatus.FINISHED, "a")


def nested(levels: int) -> list:
    value: list = []
    for _ in range(levels):
        value = [value]
    return value


TOKENS = {"type": "tokens", "position": 1, "token_ids": [5], "text": "a"}
LOGPROBS = {"token_id": 5, "logprob": -0.5, "top": [[5, -0.5]]}


@pytest.mark.parametrize(
    "raw",
    [
        msgpack.packb({"type": nested(500)}),
        msgpack.packb({"a": nested(500)}) + b"\x00",
        msgpack.packb(nested(500)) + b"\x00",
        msgpack.packb(TOKENS | {"token_ids": nested(500)}),
        msgpack.packb(TOKENS | {"logprobs": [LOGPROBS | {"top_bytes": None}]}),
        msgpack.packb(TOKENS | {"logprobs": [LOGPROBS | {"top_bytes": {}}]}),
        msgpack.packb(TOKENS | {"logprobs": [LOGPROBS | {"rank": "1"}]}),
        msgpack.packb(TOKENS | {"prompt_logprobs": [LOGPROBS]}),
        msgpack.packb(TOKENS | {"prompt_logprobs": [None, LOGPROBS | {"token_id": "1"}]}),
        msgpack.packb(TOKENS | {"logprobs": [LOGPROBS | {"decoded_token": 7}]}),
        msgpack.packb(TOKENS | {"logprobs": [LOGPROBS | {"top_decoded_tokens": [7]}]}),
    ],
    ids=[
        "nested type",
        "more behind a map",
        "more behind a list",
        "nested ids",
        "no top_bytes",
        "map top_bytes",
        "text rank",
        "prompt_logprobs of a first token",
        "text in prompt_logprobs",
        "number decoded_token",
        "number top_decoded_token",
    ],
)
def test_what_is_no_event_is_refused_with_an_error_that_can_be_quoted(raw):
    with pytest.raises(UNREADABLE) as refused:
        decode_event(raw)
    assert len(repr(refused.value)) < 200


def test_all_keys_of_a_queue_share_one_slot():
    keys = Keys("mail.3")
    made = [keys.job("a"), keys.tokens("a"), keys.channel("a"), keys.replies("r"), keys.idem("i"), keys.dead]
    assert all(
        "{mail.3}" in key for key in [*made, *keys.all_jobs, keys.workers, keys.settings, keys.control]
    )
    with pytest.raises(ValueError, match="queue's name"):
        Keys("a}b")
