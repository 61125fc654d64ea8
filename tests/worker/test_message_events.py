"""Deltas and messages of the engine's outputs, in the events that a worker makes of them."""

import pytest

from ingine.contract.calls.begin import Begun
from ingine.contract.calls.running import Append
from ingine.contract.entries import Entry
from ingine.contract.events import TerminalEvent, TokensEvent, decode_event, encode_event
from ingine.contract.jobs import Job
from ingine.contract.keys import Priority
from ingine.contract.record import JobStatus
from ingine.engine.outputs import FinishReason, SeqOutput
from ingine.message import Message, MessageAssembly, MessageDelta, ToolCall, ToolCallDelta
from ingine.producer.choices import last_chunks
from ingine.sampling_params import SamplingParams
from ingine.worker.choice_events import tokens_event
from ingine.worker.jobs import RunningJob
from ingine.worker.terminal_events import terminal_event

BEGINS = MessageDelta(reasoning="hm", tool_calls=[ToolCallDelta(0, "c0", "f", '{"a"')])
GOES_ON = MessageDelta(tool_calls=[ToolCallDelta(0, arguments=": 1}")])
HELD = MessageDelta(" ", tool_calls=[ToolCallDelta(1, "c1", "g", "{}")])
WHOLE = Message(" ", "hm", [ToolCall("c0", "f", '{"a": 1}'), ToolCall("c1", "g", "{}")])


def running(n: int = 1, ending: JobStatus | None = None, *, parses_message: bool = True) -> RunningJob:
    job = Job(id="a", prompt="x", sampling=SamplingParams(n=n))
    made = RunningJob(None, job, Entry(Priority.NORMAL, "1-0", b""), Begun("run", attempt=1), position=0)
    made.ending, made.parses_message = ending, parses_message
    return made


def output(position: int, num_tokens: int = 1, **more) -> SeqOutput:
    return SeqOutput("a#1", position, [7] * num_tokens, "x" * num_tokens, 3, 0, **more)


def last(position: int, num_tokens: int = 1, reason=FinishReason.TOOL_CALLS, **more) -> SeqOutput:
    whole = {"message": WHOLE} if reason in ("stop", "tool_calls", "length") else {}
    ending = {"finish_reason": reason, "final_text": " ", "final_delta": HELD} | whole | more
    return output(position, num_tokens, **ending)


def commit(job: RunningJob, *outputs: SeqOutput) -> list[TokensEvent]:
    """The events of a job's outputs, as a reader gets them, once the log has them."""
    events = []
    for each in outputs:
        if job.choices and each.finish_reason is not None:
            job.choices[each.index].last_output = each
        if each.token_ids:
            event = tokens_event(job, each)
            append = Append(job.id, job.attempt, event, True)
            job.sent.add(append, job.position)
            job.position = append.position
            if job.choices:
                job.choices[append.index].wrote(append)
            events.append(decode_event(append.raw))
    return events


def end_of(job: RunningJob, final: SeqOutput) -> TerminalEvent:
    return decode_event(encode_event(terminal_event(job, final)))


def put_together(*deltas: dict | None) -> dict:
    assembly = MessageAssembly()
    for delta in deltas:
        assembly.add(MessageDelta.from_openai(delta or {}))
    return assembly.message().to_openai()


def test_the_terminal_event_of_one_choice_has_what_was_held_back_and_the_message():
    job, final = running(), last(3, delta=GOES_ON)
    events = commit(job, output(1, delta=BEGINS), output(2), final)
    assert [event.delta for event in events] == [BEGINS.to_openai(), {}, GOES_ON.to_openai()]
    assert all(event.message is None for event in events)
    end = end_of(job, final)
    assert (end.status, end.finish_reason, end.text) == ("finished", "tool_calls", " ")
    assert (end.delta, end.message) == (HELD.to_openai(), WHOLE.to_openai())
    assert put_together(*(event.delta for event in [*events, end])) == end.message


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.TOOL_CALLS, FinishReason.LENGTH])
def test_the_event_that_ends_a_choice_has_the_same(reason):
    job, other = running(n=2), output(1, index=1)
    final = last(2, reason=reason, delta=GOES_ON, others_run=True)
    events = commit(job, output(1, delta=BEGINS), other, final)
    assert [event.delta for event in events[:2]] == [BEGINS.to_openai(), {}]
    assert (events[2].finish_reason, events[2].text) == (reason, "x ")
    assert events[2].delta == GOES_ON.followed_by(HELD).to_openai()
    assert events[2].message == WHOLE.to_openai()
    assert put_together(*(event.delta for event in events)) == events[2].message
    end = end_of(job, last(2, index=1, reason=FinishReason.STOP))
    assert end.finish_reason == reason and end.delta is None and end.message is None
    assert end.choices[0] == {"index": 0, "num_output_tokens": 2, "finish_reason": reason}


def test_a_choice_that_only_holds_text_back_at_its_end_has_that_delta():
    job = running(n=2)
    (event,) = commit(job, last(1, delta=None, message=Message(" ")))
    assert event.delta == HELD.to_openai()
    (event,) = commit(job, last(1, index=1, delta=BEGINS, final_delta=None))
    assert event.delta == BEGINS.to_openai()


def test_a_choice_that_ends_without_a_token_has_its_message_in_the_terminal_event():
    """The worker that committed its last token would have gone on: it had a longer `max_model_len`."""
    job, final = running(n=2), last(1, num_tokens=0, index=1)
    commit(job, last(1, others_run=True), output(1, index=1, delta=BEGINS.followed_by(GOES_ON)), final)
    end = end_of(job, final)
    assert end.delta is None and end.message is None
    assert "message" not in end.choices[0] and "delta" not in end.choices[0]
    assert end.choices[1]["delta"] == HELD.to_openai()
    assert (end.choices[1]["text"], end.choices[1]["message"]) == (" ", WHOLE.to_openai())


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("status", [JobStatus.CANCELLED, JobStatus.EXPIRED])
def test_a_job_that_ends_early_has_no_message(n, status):
    """What was held back belongs to tokens that the log of a cancelled job may lack."""
    job, final = running(n, status), last(1, num_tokens=0, reason=FinishReason.ABORT)
    commit(job, output(1, delta=BEGINS), final)
    end = end_of(job, final)
    held = {"delta": HELD.to_openai(), "text": " "} if status is JobStatus.EXPIRED else {}
    found = end.choices[0] if n > 1 else {"delta": end.delta, "text": end.text}
    assert end.status == status and end.message is None
    assert {name: found[name] for name in ("delta", "text") if found.get(name)} == held
    assert "message" not in found


@pytest.mark.parametrize("n", [1, 2])
def test_a_job_that_is_cancelled_as_it_completes_has_no_message(n):
    """The engine has ended the sequence before the abort; its last tokens were not committed."""
    job, final = running(n, JobStatus.CANCELLED), last(2)
    commit(job, output(1, delta=BEGINS))
    if n > 1:
        job.choices[0].last_output = final
    end = end_of(job, final)
    assert (end.status, end.delta, end.message) == (JobStatus.CANCELLED, None, None)
    assert n == 1 or end.choices[0] == {"index": 0, "num_output_tokens": 1, "finish_reason": "abort"}


@pytest.mark.parametrize("n", [1, 2])
def test_an_output_that_adds_nothing_has_an_empty_delta(n):
    """So a reader that has seen no other event knows that the text is not the content."""
    job, final = running(n), last(2, final_delta=None, message=Message())
    assert [event.delta for event in commit(job, output(1), final)] == [{}, {}]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.ERROR, FinishReason.LENGTH])
def test_text_alone_that_was_held_back_has_an_empty_delta(n, reason):
    """A reader that begins at the job's end sees no other event. The text is no content: it may be a tag."""
    job, final = running(n), last(1, num_tokens=0, reason=reason, final_text="</think>", final_delta=None)
    commit(job, output(1), final)
    end = end_of(job, final)
    [chunk] = last_chunks(end, is_parsed=False)
    assert (chunk.text, chunk.delta) == ("</think>", {})
    assert (end.choices[0] if n > 1 else {"delta": end.delta})["delta"] == {}


@pytest.mark.parametrize("n", [1, 2])
def test_a_job_without_a_message_has_none_of_the_fields(n):
    final = last(2, delta=None, final_delta=None, message=None, reason=FinishReason.STOP)
    job = running(n, parses_message=False)
    events = [*commit(job, output(1), final), end_of(job, final)]
    assert all(event.delta is None and event.message is None for event in events)
    assert n == 1 or {"delta", "message"}.isdisjoint(events[-1].choices[0])
