"""The properties of the wire's decoders for any bytes, for the suite and for `fuzz_wire`."""

import copy
import tracemalloc
from typing import Any

import msgpack
from hypothesis import strategies as st

from ingine.contract.events import UNREADABLE, Event, TerminalEvent, TokensEvent, decode_event
from ingine.contract.faults import MAX_REASON_CHARS
from ingine.contract.jobs import Job, decode_job, encode_job
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode, InvalidJob
from ingine.message import Message, MessageDelta
from ingine.producer.channels import ANYWHERE, place_of

PEAK_PER_BYTE = 160
"""Bytes of memory per byte of a job: a map with one entry is 3 bytes on the wire, and 240 in memory."""
PEAK_AT_LEAST = 1 << 19

CANARY = "a-secret-of-the-sender"
FULL_JOB: dict[str, Any] = {
    "v": 1,
    "id": "job-1",
    "prompt": "x",
    "sampling": {
        "temperature": 0.5,
        "top_k": 5,
        "top_p": 0.9,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "seed": 7,
        "max_tokens": 9,
        "min_tokens": 2,
        "stop": ["end"],
        "stop_token_ids": [3],
        "ignore_eos": True,
        "logit_bias": {7: 1.5},
        "logprobs": 2,
        "structured_outputs": {"json": {"type": "object", "properties": {"a": {"type": "integer"}}}},
        "prompt_logprobs": 2,
        "bad_words": ["bad"],
        "allowed_token_ids": [7, 8],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "detokenize": True,
        "truncate_prompt_tokens": 100,
    },
    "priority": "low",
    "tenant": "t",
    "deadline_ms": 5000,
    "not_before_ms": 10,
    "stream": False,
    "reply_to": "r",
    "model": "m",
    "metadata": {"key": [1]},
    "trace": "00-1-2-3",
}
"""A job with every field except `messages`, which excludes `prompt`."""


def packed(value: Any) -> bytes:
    return msgpack.packb(value)


def at(job: dict, path: tuple, value: Any) -> dict:
    """A copy of `job` with `value` at `path`. If that is in `messages`, they replace `prompt`."""
    changed = copy.deepcopy(job)
    if path[0] == "messages":
        changed["prompt"] = None
        changed["messages"] = [{"role": "user", "content": "x"}]
    place = changed
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return changed


def check_job(raw: bytes) -> Job | None:
    try:
        job = decode_job(raw)
    except InvalidJob as fault:
        assert fault.code in ErrorCode
        assert 0 < len(str(fault)) <= MAX_REASON_CHARS
        assert str(fault).isprintable(), "a terminal shows it"
        return None
    # Compared as bytes: NaN is not equal to itself.
    assert encode_job(decode_job(encode_job(job))) == encode_job(job)
    return job


def check_event(raw: bytes) -> Event | None:
    assert -(2**63) <= place_of(raw)[0] <= ANYWHERE[0]
    try:
        event = decode_event(raw)
    except UNREADABLE:
        return None
    assert event.position >= 0
    if isinstance(event, TokensEvent):
        assert event.position - len(event.token_ids) >= 0
    else:
        assert event.status not in (JobStatus.DELAYED, JobStatus.QUEUED, JobStatus.RUNNING)
    return event


def check_peak(raw: bytes) -> Job | None:
    """Check what `check_job` does, and that memory is proportional to the bytes."""
    allowed = max(PEAK_AT_LEAST, PEAK_PER_BYTE * len(raw))
    job, peak = _traced(raw)
    if peak > allowed:  # a table of the interpreter may have grown, which happens once
        job, peak = _traced(raw)
    assert peak <= allowed, f"{peak / len(raw):.0f} bytes for each"
    return job


def _traced(raw: bytes) -> tuple[Job | None, int]:
    tracemalloc.start()
    try:
        return check_job(raw), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def events() -> st.SearchStrategy[Event]:
    token_ids = st.lists(st.integers(0, 2**31 - 1), max_size=5)
    delta = st.none() | st.text(min_size=1).map(lambda text: MessageDelta(text, text).to_openai())
    tokens = st.builds(
        lambda ids, before, text, delta: TokensEvent(before + len(ids), ids, text, delta=delta),
        token_ids,
        st.integers(0, 2**40),
        st.text(),
        delta,
    )
    terminal = st.builds(
        TerminalEvent,
        position=st.integers(0, 2**53),
        status=st.sampled_from([status for status in JobStatus if status.terminal]),
        job_id=st.text(min_size=1),
        text=st.text(),
        error=st.none() | st.just({"code": "x", "message": "y"}),
        metadata=st.none() | st.dictionaries(st.text() | st.integers(0, 9), st.text(), min_size=1),
        delta=delta,
        message=st.none() | st.text().map(lambda text: Message(text, text).to_openai()),
    )
    return tokens | terminal
