"""Several choices for a consumer: chunks with an index, results, a log that comes back in another order."""

import asyncio

import pytest
from redis.asyncio import Redis

from ingine.contract.events import TerminalEvent, TokensEvent, encode_event
from ingine.contract.keys import EVENT_FIELD, Keys, log_id
from ingine.contract.record import JobStatus
from ingine.errors import JobNotFound
from ingine.producer import AsyncClient, BadRecord, Choice, Chunk
from ingine.producer.choices import choices_of
from ingine.producer.openai.batch_format import COMPLETIONS_URL, is_cut, output_row
from ingine.producer.partitions import Partitions
from ingine.producer.token_log import LogReader
from tests.producer.conftest import Face
from tests.producer.fake_worker import FakeWorker
from tests.producer.test_batch_format import parse, result
from tests.producer.test_streams import has

ENDS = [
    {"index": 0, "finish_reason": "length", "num_output_tokens": 2},
    {"index": 1, "finish_reason": "stop", "num_output_tokens": 2, "stop_reason": "x", "text": "held"},
]


@pytest.fixture
async def job_id(face: Face, worker: FakeWorker) -> str:
    await face("submit", "hi", n=2)
    job = await worker.take()
    assert job.sampling.n == 2
    return job.id


async def commit(
    worker: FakeWorker, job_id: str, order: list[int], start: int = 0, *, has_end: bool = True
) -> None:
    """Commit one token of a choice for each item of `order`. Token p of choice i is 10 * i + p."""
    for position in range(start + 1, len(order) + 1):
        index = order[position - 1]
        number = order[:position].count(index)
        reason = "length" if has_end and (index, number) == (0, 2) else None
        token_id = 10 * index + number
        event = TokensEvent(position, [token_id], f"<{token_id}>", None, index, number, reason)
        raw = encode_event(event)
        await worker.redis.xadd(worker.keys.tokens(job_id), {EVENT_FIELD: raw}, id=log_id(position))
        await worker.redis.hset(worker.keys.job(job_id), "position", position)
        await worker.publish(job_id, raw)


def by_choice(chunks: list[Chunk]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for chunk in chunks:
        found.setdefault(chunk.index, []).extend(chunk.token_ids)
    return found


async def test_chunks_and_results_name_their_choices(face: Face, worker: FakeWorker, job_id: str):
    await commit(worker, job_id, [0, 1, 1, 0])
    await worker.end(job_id, 4, choices=ENDS)
    chunks = await face.stream(job_id)
    assert [(chunk.index, chunk.choice_position, chunk.position) for chunk in chunks] == [
        (0, 1, 1),
        (1, 1, 2),
        (1, 2, 3),
        (0, 2, 4),
        (1, 2, 4),
    ]
    assert [chunk.finish_reason for chunk in chunks] == [None, None, None, "length", None]
    assert chunks[-1].text == "held"
    found = await face.result(job_id)
    assert found.choices == [
        Choice(0, "<1><2>", [1, 2], "length"),
        Choice(1, "<11><12>held", [11, 12], "stop", "x"),
    ]
    assert (found.text, found.token_ids, found.finish_reason) == ("<1><2>", [1, 2], "length")


async def test_a_stream_goes_on_from_a_position(face: Face, worker: FakeWorker, job_id: str):
    await commit(worker, job_id, [0, 1, 1, 0])
    await worker.end(job_id, 4, choices=ENDS)
    for position in range(5):
        chunks = await face.stream(job_id, position)
        assert sum(len(chunk.token_ids) for chunk in chunks) == 4 - position


async def test_a_job_of_one_choice_has_one(face: Face, worker: FakeWorker):
    await face("submit", "hi", job_id="one")
    await worker.run((await worker.take()).id, 2, text="!")
    found = await face.result("one")
    assert found.choices == [Choice(0, "<1><2>!", [1, 2], "length")]
    assert {chunk.choice_position for chunk in await face.stream("one")} == {None}


async def lose(redis: Redis, keys: Keys, job_id: str, kept: int) -> None:
    """Let the server lose all but the first events."""
    entries = await redis.xrange(keys.tokens(job_id))
    async with redis.pipeline(transaction=True) as moment:
        moment.delete(keys.tokens(job_id))
        for entry_id, fields in entries[:kept]:
            moment.xadd(keys.tokens(job_id), fields, id=entry_id)
        moment.hset(keys.job(job_id), "position", kept)
        await moment.execute()


@pytest.mark.parametrize("order", [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0], [0, 1, 0, 1, 0, 1]], ids=str)
async def test_a_log_that_was_lost_and_written_in_another_order(
    face: Face, worker: FakeWorker, job_id: str, order, monkeypatch
):
    monkeypatch.setattr("ingine.producer.streams.SILENCE_S", 0.05)
    chunks: list[Chunk] = []
    consumer = asyncio.create_task(face.stream(job_id, into=chunks))
    await commit(worker, job_id, [0, 1, 0, 1], has_end=False)
    await has(chunks, 4)
    await lose(worker.redis, worker.keys, job_id, 1)
    await commit(worker, job_id, order, 1, has_end=False)
    ends = [{"index": index, "finish_reason": "length", "num_output_tokens": 3} for index in range(2)]
    await worker.end(job_id, 6, choices=ends)
    await consumer
    assert by_choice(chunks) == {0: [1, 2, 3], 1: [11, 12, 13]}
    assert "".join(chunk.text for chunk in chunks if chunk.index == 1) == "<11><12><13>"
    assert [choice.token_ids for choice in (await face.result(job_id)).choices] == [[1, 2, 3], [11, 12, 13]]


@pytest.mark.parametrize("order", [[0, 0, 0, 1, 1, 1], [0, 1, 1, 1, 0, 0], [0, 1, 0, 1, 0, 1]], ids=str)
@pytest.mark.parametrize("begin", [1, 2, 3])
async def test_a_stream_that_began_later_reads_a_log_in_another_order(
    face: Face, worker: FakeWorker, job_id: str, order, begin, monkeypatch
):
    monkeypatch.setattr("ingine.producer.streams.SILENCE_S", 0.05)
    chunks: list[Chunk] = []
    await commit(worker, job_id, [0, 1, 0, 1], has_end=False)
    consumer = asyncio.create_task(face.stream(job_id, begin, into=chunks))
    await has(chunks, 4 - begin)
    await lose(worker.redis, worker.keys, job_id, 1)
    await commit(worker, job_id, order, 1, has_end=False)
    ends = [{"index": index, "finish_reason": "length", "num_output_tokens": 3} for index in range(2)]
    await worker.end(job_id, 6, choices=ends)
    await consumer
    before = {0: [1], 1: [11]} if begin > 1 else {0: [1], 1: []}
    before[0] = [1, 2] if begin == 3 else [1]
    found = by_choice(chunks)
    assert {index: before[index] + found[index] for index in found} == {0: [1, 2, 3], 1: [11, 12, 13]}


@pytest.mark.parametrize("begin", [0, 1])
async def test_a_stream_goes_on_after_a_move_and_reads_another_order(
    client: AsyncClient, worker: FakeWorker, begin, monkeypatch
):
    """The number of partitions changes while the stream runs, and the server loses events meanwhile."""
    monkeypatch.setattr("ingine.producer.streams.SILENCE_S", 0.05)
    job, moving, chunks = await client.submit("hi", n=2), asyncio.Event(), []
    job_id, read = (await worker.take()).id, LogReader.read

    async def read_or_move(reader, *args, **options):
        if moving.is_set():
            moving.clear()
            raise JobNotFound("the job has moved")
        return await read(reader, *args, **options)

    async def moved(*_) -> bool:
        await lose(worker.redis, worker.keys, job_id, 1)
        await commit(worker, job_id, [0, 0, 0, 1, 1, 1], 1, has_end=False)
        ends = [{"index": index, "finish_reason": "length", "num_output_tokens": 3} for index in range(2)]
        await worker.end(job_id, 6, choices=ends)
        return True

    async def follow() -> None:
        async for chunk in job.stream(begin):
            chunks.append(chunk)

    monkeypatch.setattr(LogReader, "read", read_or_move)
    monkeypatch.setattr(Partitions, "moved", moved)
    await commit(worker, job_id, [0, 1, 0, 1], has_end=False)
    consumer = asyncio.create_task(follow())
    await has(chunks, 4 - begin)
    moving.set()
    await consumer
    assert by_choice(chunks) == {0: [1, 2, 3][begin:], 1: [11, 12, 13]}


async def test_a_log_whose_choices_have_gaps_is_refused(face: Face, worker: FakeWorker, job_id: str):
    event = encode_event(TokensEvent(1, [5], "x", None, 1, 2))
    await worker.redis.xadd(worker.keys.tokens(job_id), {EVENT_FIELD: event}, id=log_id(1))
    await worker.end(job_id, 1, choices=ENDS)
    with pytest.raises(BadRecord):
        await face.result(job_id)


def test_a_batch_line_has_all_choices_in_openais_shape():
    choices = [Choice(0, "a", [1], "stop"), Choice(1, "b", [2, 3], "length")]
    line = parse({"prompt": "x", "model": "m", "n": 2}, url=COMPLETIONS_URL)
    assert line.arguments["sampling"] == {"n": 2}
    row = output_row(line, result(choices=choices))
    assert [
        (each["index"], each["text"], each["finish_reason"]) for each in row["response"]["body"]["choices"]
    ] == [
        (0, "a", "stop"),
        (1, "b", "length"),
    ]
    assert is_cut(row)
    line = parse({"messages": [{"role": "user", "content": "x"}], "model": "m", "n": 2})
    bodies = output_row(line, result(choices=choices))["response"]["body"]["choices"]
    assert [each["message"]["content"] for each in bodies] == ["a", "b"]


def test_the_events_of_a_job_are_read_once_however_many_choices_it_has():
    class Events(list):
        num_reads = 0

        def __iter__(self):
            self.num_reads += 1
            return super().__iter__()

    events = Events(
        TokensEvent(i + 1, [i], f"<{i}>", index=i % 3, choice_position=i // 3 + 1) for i in range(6)
    )
    ends = [{"index": i, "finish_reason": "stop", "num_output_tokens": 2} for i in range(4)]
    found = choices_of(events, TerminalEvent(6, JobStatus.FINISHED, "a", choices=ends))
    assert [choice.text for choice in found] == ["<0><3>", "<1><4>", "<2><5>", ""]
    assert events.num_reads == 1
