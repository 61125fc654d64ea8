"""A response, and its events, as functions of the log of its job. Without a server."""

import pytest

from ingine.contract.events import TerminalEvent, TokensEvent
from ingine.contract.record import JobStatus
from ingine.gateway.responses.events import PER_ENTRY, ResponseLog
from ingine.gateway.responses.fields import fields_of, metadata_of, response_fields

ID = f"resp_{'0' * 32}"
FIELDS = fields_of(ID, None)


def end_of(position: int, status: JobStatus = JobStatus.FINISHED, **fields) -> TerminalEvent:
    fields.setdefault("finish_reason", "stop")
    return TerminalEvent(position, status, ID, **fields)


def events_of(*log) -> list[dict]:
    response = ResponseLog(FIELDS)
    made = response.begin()
    for event in log:
        made += response.add(event)
    return made


TEXT = [TokensEvent(1, [1], "a"), TokensEvent(3, [2, 3], ""), TokensEvent(4, [4], "b"), end_of(4, text="c")]


def test_events_of_a_text():
    made = events_of(*TEXT)
    assert [each["type"] for each in made] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(each["delta"] for each in made if "delta" in each) == made[-4]["text"] == "abc"
    message = {"type": "message", "role": "assistant", "status": "completed", "id": f"msg_{'0' * 32}00"}
    message["content"] = [{"type": "output_text", "text": "abc", "annotations": [], "logprobs": []}]
    assert made[-1]["response"]["output"] == [message] == [made[-2]["item"]]


def test_numbers_depend_on_the_position_alone():
    made = events_of(*TEXT)
    numbers = [each["sequence_number"] for each in made]
    assert numbers == sorted(set(numbers)) and numbers[:3] == [0, 1, PER_ENTRY]
    assert numbers[6] == 4 * PER_ENTRY + PER_ENTRY // 2
    assert made == events_of(*TEXT)


REASONING = {"reasoning": "hm"}
CALL = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{"}}
OTHER_CALL = {"index": 1, "id": "call_2", "type": "function", "function": {"name": "g", "arguments": ""}}


def test_events_of_reasoning_content_and_calls():
    deltas = [
        REASONING,
        {"content": "so"},
        {"tool_calls": [CALL]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "}"}}, OTHER_CALL]},
    ]
    log = [TokensEvent(n, [n], "?", delta=delta) for n, delta in enumerate(deltas, 1)]
    made = events_of(*log, end_of(4, finish_reason="tool_calls", message={"role": "assistant"}))
    output = made[-1]["response"]["output"]
    assert [(item["type"], item["status"]) for item in output] == [
        ("reasoning", "completed"),
        ("message", "completed"),
        ("function_call", "completed"),
        ("function_call", "completed"),
    ]
    assert output[0]["content"] == [{"type": "reasoning_text", "text": "hm"}] and output[0]["summary"] == []
    assert (output[2]["name"], output[2]["call_id"], output[2]["arguments"]) == ("f", "call_1", "{}")
    assert (output[3]["name"], output[3]["call_id"], output[3]["arguments"]) == ("g", "call_2", "")
    done = [each["item"] for each in made if each["type"] == "response.output_item.done"]
    assert sorted(done, key=lambda item: item["id"][-2:]) == output
    added = [each["output_index"] for each in made if each["type"] == "response.output_item.added"]
    assert added == [0, 1, 2, 3]
    assert made[-1]["response"]["status"] == "completed"
    numbers = [each["sequence_number"] for each in made]
    assert numbers == sorted(set(numbers))


@pytest.mark.parametrize(
    ("end", "kind", "status"),
    [
        (end_of(1, finish_reason="length"), "response.incomplete", "incomplete"),
        (end_of(1, JobStatus.FAILED, error={"code": "c", "message": "m"}), "response.failed", "failed"),
        (end_of(1, JobStatus.EXPIRED, error={"code": "c", "message": "m"}), "response.failed", "failed"),
        (end_of(1, JobStatus.CANCELLED), "response.failed", "cancelled"),
    ],
)
def test_how_a_response_may_end(end, kind, status):
    last = events_of(TokensEvent(1, [1], "a"), end)[-1]
    response = last["response"]
    assert (last["type"], response["status"]) == (kind, status)
    assert response["output"][0]["content"][0]["text"] == "a"
    assert response["output"][0]["status"] == "incomplete"
    assert response["error"] == ({"code": "c", "message": "m"} if status == "failed" else None)
    assert (response["incomplete_details"] is not None) == (status == "incomplete")


def test_a_finished_response_without_tokens_has_an_empty_message():
    made = events_of(end_of(0, usage={"num_prompt_tokens": 3}))
    assert made[-1]["response"]["output"][0]["content"][0]["text"] == ""
    assert made[-1]["response"]["usage"]["input_tokens"] == 3
    assert events_of(end_of(0, JobStatus.FAILED))[-1]["response"]["output"] == []


def test_fields_survive_in_the_jobs_metadata():
    body = {"model": "m", "instructions": "be brief", "temperature": 0, "metadata": {"a": "b"}, "input": "x"}
    fields = response_fields(body, ID, created_at=7, background=True)
    assert fields_of(ID, metadata_of(fields)) == fields
    assert (fields["created_at"], fields["background"], fields["instructions"]) == (7, True, "be brief")
    assert "input" not in fields and fields["store"] is True


def test_fields_that_are_too_large_are_left_out():
    body = {"model": "m", "instructions": "x" * 20_000, "metadata": {"a": "b"}}
    fields = response_fields(body, ID, created_at=7, background=False)
    assert fields["instructions"] is None and fields["metadata"] == {"a": "b"}


@pytest.mark.parametrize("stored", [None, 1, "", "[]", "{", '{"id": "other", "status": "x"}', "[" * 100_000])
def test_any_metadata_can_be_read(stored):
    fields = fields_of(ID, {"openai_response": stored})
    assert fields == FIELDS and fields["id"] == ID
