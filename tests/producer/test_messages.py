"""Assistant messages for a consumer: deltas of chunks, messages of results, and rows of a batch."""

from typing import Any

import pytest

from ingine.contract.events import TokensEvent, encode_event
from ingine.contract.keys import EVENT_FIELD, log_id
from ingine.contract.record import JobStatus
from ingine.message import Message, MessageAssembly, MessageDelta, ToolCall, ToolCallDelta
from ingine.producer import Choice, Chunk, JobCancelled
from ingine.producer.openai.batch_format import output_row
from tests.producer.conftest import Face
from tests.producer.fake_worker import FakeWorker
from tests.producer.test_batch_format import HI, TOOL, parse, result

CALLS = {"tools": [TOOL], "messages": HI}
DELTAS = [
    MessageDelta(),
    MessageDelta(reasoning="hm"),
    MessageDelta("Let me see."),
    MessageDelta(tool_calls=[ToolCallDelta(0, "call_1", "f", '{"a"')]),
    MessageDelta(tool_calls=[ToolCallDelta(0, arguments=": 1}"), ToolCallDelta(1, "call_2", "f", "{}")]),
]
WHOLE = Message("Let me see.", "hm", [ToolCall("call_1", "f", '{"a": 1}'), ToolCall("call_2", "f", "{}")])


async def commit(worker: FakeWorker, job_id: str, *events: TokensEvent) -> None:
    for event in events:
        raw = encode_event(event)
        await worker.redis.xadd(worker.keys.tokens(job_id), {EVENT_FIELD: raw}, id=log_id(event.position))
        await worker.redis.hset(worker.keys.job(job_id), "position", event.position)
        await worker.publish(job_id, raw)


def put_together(chunks: list[Chunk]) -> dict[str, Any]:
    assembly = MessageAssembly()
    for chunk in chunks:
        assembly.add(MessageDelta.from_openai(chunk.delta))
    return assembly.message().to_openai()


@pytest.fixture
async def job_id(face: Face, worker: FakeWorker) -> str:
    """The id of a job whose output is parsed, and has been committed but for its end."""
    await face("submit", **CALLS, tool_choice="required", parallel_tool_calls=False)
    job = await worker.take()
    assert (job.tools, job.tool_choice, job.parallel_tool_calls) == ((TOOL,), "required", False)
    events = [
        TokensEvent(number, [number], f"<{number}>", delta=delta.to_openai())
        for number, delta in enumerate(DELTAS, 1)
    ]
    await commit(worker, job.id, *events)
    return job.id


async def test_chunks_have_deltas_and_the_result_has_the_message(face: Face, worker: FakeWorker, job_id: str):
    await worker.end(job_id, 5, finish_reason="tool_calls", message=WHOLE.to_openai())
    chunks = await face.stream(job_id)
    assert [chunk.delta for chunk in chunks] == [delta.to_openai() for delta in DELTAS]
    found = await face.result(job_id)
    assert put_together(chunks) == found.message == found.choices[0].message == WHOLE.to_openai()
    assert (found.text, found.finish_reason) == ("<1><2><3><4><5>", "tool_calls")


async def test_what_was_held_back_comes_as_a_last_chunk(face: Face, worker: FakeWorker, job_id: str):
    held = MessageDelta(" <tool")
    await worker.end(
        job_id, 5, text="<tool", delta=held.to_openai(), message=WHOLE.to_openai(), finish_reason="stop"
    )
    assert (await face.stream(job_id, 5))[0].delta == {"content": " <tool"}


async def test_text_that_is_held_back_and_not_content_adds_nothing(
    face: Face, worker: FakeWorker, job_id: str
):
    await worker.end(job_id, 5, text="</tool_call>", message=WHOLE.to_openai(), finish_reason="tool_calls")
    for position in (0, 5):
        last = (await face.stream(job_id, position))[-1]
        assert (last.text, last.delta) == ("</tool_call>", {})


async def test_a_stream_that_begins_within_an_event_gets_all_of_its_delta(face: Face, worker: FakeWorker):
    await face("submit", **CALLS, job_id="one")
    await worker.take()
    await commit(worker, "one", TokensEvent(2, [1, 2], "<1><2>", delta={"content": "a"}))
    await worker.end("one", 2, finish_reason="stop", message=Message("a").to_openai())
    [chunk] = await face.stream("one", 1)
    assert (chunk.token_ids, chunk.text, chunk.delta) == ([2], "<1><2>", {"content": "a"})


async def test_a_message_that_is_not_parsed_has_the_text_as_content(face: Face, worker: FakeWorker):
    await face("submit", messages=HI, job_id="one")
    await worker.run((await worker.take()).id, 2, text="!", finish_reason="stop")
    chunks = await face.stream("one")
    assert [chunk.delta for chunk in chunks] == [{"content": text} for text in ("<1>", "<2>", "!")]
    assert all(chunk.parsed is None for chunk in chunks)
    found = await face.result("one")
    assert found.message == {"role": "assistant", "content": "<1><2>!"} == put_together(chunks)


async def test_each_choice_has_its_message(face: Face, worker: FakeWorker):
    """Choice 0 ends with an event of tokens, choice 1 only with the job."""
    await face("submit", **CALLS, n=2, job_id="two")
    await worker.take()
    second = Message("ab")
    await commit(
        worker,
        "two",
        TokensEvent(
            1, [7], "x", None, 0, 1, "stop", delta={"content": "x"}, message=Message("x").to_openai()
        ),
        TokensEvent(2, [8], "<a", None, 1, 1, delta={"content": "a"}),
    )
    ends = [
        {"index": 0, "finish_reason": "stop", "num_output_tokens": 1},
        {"index": 1, "finish_reason": "length", "num_output_tokens": 1, "text": ">"},
    ]
    ends[1] |= {"delta": {"content": "b"}, "message": second.to_openai()}
    await worker.end("two", 2, finish_reason="stop", choices=ends)
    chunks = await face.stream("two")
    assert [(chunk.index, chunk.delta["content"]) for chunk in chunks] == [(0, "x"), (1, "a"), (1, "b")]
    found = await face.result("two")
    assert [choice.message["content"] for choice in found.choices] == ["x", "ab"]
    assert found.message == found.choices[0].message


async def test_a_job_that_was_cancelled_has_its_deltas(face: Face, worker: FakeWorker, job_id: str):
    await worker.end(job_id, 5, JobStatus.CANCELLED)
    chunks: list[Chunk] = []
    with pytest.raises(JobCancelled):
        await face.stream(job_id, into=chunks)
    assert put_together(chunks) == WHOLE.to_openai()


def test_the_row_of_a_chat_has_its_tool_calls_and_reasoning():
    line = parse(CALLS | {"model": "m", "n": 2})
    calls = Message("", "hm", WHOLE.tool_calls)
    choices = [
        Choice(0, "<tool_call>", [1], "tool_calls", parsed=calls.to_openai()),
        Choice(1, "plain", [2], "stop", parsed=Message("plain").to_openai()),
    ]
    first, second = output_row(line, result(choices=choices))["response"]["body"]["choices"]
    assert first["message"] == calls.to_openai() | {"refusal": None}
    assert first["message"]["content"] is None and len(first["message"]["tool_calls"]) == 2
    assert first["finish_reason"] == "tool_calls"
    assert second["message"] == {"role": "assistant", "content": "plain", "refusal": None}
