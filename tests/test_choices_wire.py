"""Several choices on the wire: what a job may ask for, and which logs a reader accepts."""

import msgpack
import pytest

from ingine.contract.events import (
    UNREADABLE,
    TerminalEvent,
    TokensEvent,
    decode_event,
    decode_log,
    encode_event,
)
from ingine.contract.jobs import MAX_TOKEN_COST, Job, decode_job, encode_job, token_cost
from ingine.errors import ErrorCode, InvalidJob
from ingine.sampling_params import MAX_CHOICES, SamplingParams

# As they were before there were several choices.
TOKENS = (
    "84a474797065a6746f6b656e73a8706f736974696f6e07a9746f6b656e5f69647392ccc6cd0314a474657874a56f66206974"
)
END = (
    "85a474797065a866696e6973686564a8706f736974696f6e07a66a6f625f6964a161ad66696e6973685f726561736f6ea473746f70"
    "a5757361676581b16e756d5f6f75747075745f746f6b656e7307"
)
JOB = "84a26964a161a670726f6d7074a178a17601a873616d706c696e6782a47365656403aa6d61785f746f6b656e7305"


def entry(event) -> tuple[bytes, dict[bytes, bytes]]:
    kind = 1 if isinstance(event, TerminalEvent) else 0
    return f"{event.position}-{kind}".encode(), {b"event": encode_event(event)}


def tokens(position: int, index: int, choice_position: int, ids=(5,), **more) -> TokensEvent:
    return TokensEvent(position, list(ids), "x", None, index, choice_position, **more)


def read(*events, position: int = 0, **more):
    return decode_log("a", position, map(entry, events), **more)


@pytest.mark.parametrize(
    ("n", "code"),
    [
        (0, ErrorCode.INVALID_PARAMETER),
        (-1, ErrorCode.INVALID_PARAMETER),
        (MAX_CHOICES + 1, ErrorCode.INVALID_PARAMETER),
        (10**6, ErrorCode.INVALID_PARAMETER),
        (1.5, ErrorCode.INVALID_TYPE),
        ("2", ErrorCode.INVALID_TYPE),
        (True, ErrorCode.INVALID_TYPE),
        ([2], ErrorCode.INVALID_TYPE),
    ],
    ids=repr,
)
def test_a_wrong_number_of_choices_is_refused_with_a_stable_code(n, code):
    with pytest.raises(InvalidJob, match=r"sampling\.n") as caught:
        decode_job(msgpack.packb({"v": 1, "id": "a", "prompt": "x", "sampling": {"n": n}}))
    assert caught.value.code == code and caught.value.job_id == "a"


def test_a_number_of_choices_comes_back_as_it_went_and_one_is_as_if_not_given():
    job = Job(id="a", prompt="x", sampling=SamplingParams(n=MAX_CHOICES))
    assert decode_job(encode_job(job)).sampling.n == MAX_CHOICES
    one, none = SamplingParams(n=1, top_k=3), SamplingParams(top_k=3)
    assert one.given() == none.given()
    assert encode_job(Job(id="a", prompt="x", sampling=one)) == encode_job(
        Job(id="a", prompt="x", sampling=none)
    )


def test_the_cost_counts_the_prompt_once_and_the_output_of_each_choice():
    assert token_cost(10, 7, 4) == 38
    assert token_cost(10, 10**9, MAX_CHOICES) == MAX_CHOICES * MAX_TOKEN_COST


def test_jobs_and_events_of_one_choice_keep_their_bytes():
    event = TokensEvent(7, [198, 788], "of it")
    assert encode_event(event).hex() == TOKENS
    assert decode_event(bytes.fromhex(TOKENS)) == event
    end = TerminalEvent(7, "finished", "a", finish_reason="stop", usage={"num_output_tokens": 7})
    assert encode_event(end).hex() == END
    job = Job(id="a", prompt="x", sampling=SamplingParams(n=1, max_tokens=5, seed=3))
    assert encode_job(job).hex() == JOB


@pytest.mark.parametrize(
    "event",
    [
        tokens(7, 0, 3, [1, 2]),
        tokens(7, 3, 2, finish_reason="stop", stop_reason="\n"),
        tokens(7, 3, 2, finish_reason="stop", stop_reason=5),
        tokens(7, 3, 2, finish_reason="length"),
        TerminalEvent(
            7,
            "expired",
            "a",
            choices=[
                {"index": 0, "finish_reason": "stop", "num_output_tokens": 4, "stop_reason": 2},
                {"index": 1, "finish_reason": "abort", "num_output_tokens": 3, "text": "held"},
            ],
        ),
    ],
)
def test_events_of_a_choice_come_back_as_they_went(event):
    assert decode_event(encode_event(event)) == event


@pytest.mark.parametrize(
    "fields",
    [
        {"index": -1, "choice_position": 1},
        {"index": True, "choice_position": 1},
        {"index": 0, "choice_position": 0},
        {"index": 0, "choice_position": "1"},
        {"index": 1},
        {"finish_reason": "stop"},
        {"index": 1, "choice_position": 1, "finish_reason": 3},
        {"index": 1, "choice_position": 1, "stop_reason": [1]},
    ],
    ids=repr,
)
def test_a_choice_of_another_shape_is_no_event(fields):
    raw = msgpack.packb({"type": "tokens", "position": 1, "token_ids": [1], "text": ""} | fields)
    with pytest.raises(UNREADABLE):
        decode_event(raw)


@pytest.mark.parametrize(
    "choices",
    [
        {},
        [1],
        [{"index": 1, "finish_reason": "stop", "num_output_tokens": 0}],
        [{"index": 0, "num_output_tokens": 0}],
        [{"index": 0, "finish_reason": "stop", "num_output_tokens": -1}],
        [{"index": 0, "finish_reason": "stop", "num_output_tokens": 0, "text": 5}],
        [{"index": 0, "finish_reason": "stop", "num_output_tokens": 0, "stop_reason": {}}],
    ],
    ids=repr,
)
def test_ends_of_another_shape_are_no_event(choices):
    with pytest.raises(UNREADABLE):
        decode_event(msgpack.packb({"type": "finished", "position": 0, "job_id": "a", "choices": choices}))


def test_a_log_of_several_choices_is_one_chain():
    events = [
        tokens(1, 0, 1),
        tokens(2, 2, 1),
        tokens(4, 1, 2, [1, 2], finish_reason="stop"),
        tokens(5, 0, 2),
        TerminalEvent(5, "finished", "a"),
    ]
    assert read(*events) == events
    assert read(*events[2:], position=2) == events[2:]


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ([tokens(1, 0, 1), tokens(2, 0, 1)], "choice 0 continues from 0, not 1"),
        ([tokens(1, 0, 1), tokens(2, 0, 3)], "choice 0 continues from 2, not 1"),
        ([tokens(1, 1, 2)], "choice 1 continues from 1, not 0"),
        ([tokens(1, 0, 1, finish_reason="stop"), tokens(2, 0, 2)], "choice 0 continues after its end"),
        ([tokens(1, 0, 1), TokensEvent(2, [5], "x")], "name a choice"),
        ([TokensEvent(1, [5], "x"), tokens(2, 0, 1)], "name a choice"),
    ],
    ids=["repeat", "gap", "gap at the start", "after its end", "without a choice", "with a choice"],
)
def test_a_log_in_which_a_choice_does_not_continue_is_refused(events, says):
    with pytest.raises(ValueError, match=says):
        read(*events)
