"""Forged messages on a channel change nothing, and what no worker wrote under a job's keys is an error."""

import asyncio
import json
import random
from collections.abc import Callable
from pathlib import Path

import msgpack
import pytest
from redis.asyncio import Redis

from ingine.contract.events import TerminalEvent, TokensEvent, encode_event
from ingine.contract.keys import EVENT_FIELD, Keys
from ingine.contract.record import JobStatus
from ingine.producer import AsyncClient, AsyncJobHandle, BadRecord, JobNotFound
from ingine.producer.batch import Batch
from ingine.producer.batch_input import InputFile
from ingine.producer.streams import LONGEST_SPACING_S
from ingine.producer.token_log import LogReader
from tests.producer.conftest import Server
from tests.producer.fake_worker import FakeWorker
from tests.waiting import HANGS_S, wait_until_async


def tokens(position: int, *token_ids: int, text: str = "FORGED") -> bytes:
    return encode_event(TokensEvent(position, list(token_ids), text))


def end(position: int, job_id: str, status: JobStatus = JobStatus.FINISHED) -> bytes:
    return encode_event(TerminalEvent(position, status, job_id, "FORGED", finish_reason="stop"))


async def test_what_is_published_is_never_handed_out(client: AsyncClient, worker: FakeWorker):
    """Each forgery arrives before the real event, and could be mistaken for it."""
    handle = await client.submit("hi")
    job_id = (await worker.take()).id
    stream, result = handle.stream(), asyncio.create_task(handle.result())
    chunks = []
    for position in range(1, 5):
        for forged in (
            tokens(position, 666),
            end(position - 1, job_id),
            end(position - 1, job_id, JobStatus.FAILED),
            end(position - 1, "another"),
            b"\xc1",
        ):
            await worker.publish(job_id, forged)
        await worker.commit(job_id, position - 1, position)
        chunks.append(await anext(stream))
    await worker.end(job_id, 4, text=".")
    chunks += [chunk async for chunk in stream]
    assert "".join(chunk.text for chunk in chunks) == "<1><2><3><4>."
    assert [chunk.token_ids for chunk in chunks] == [[1], [2], [3], [4], []]
    assert (await result).text == "<1><2><3><4>."


async def quiet(client: AsyncClient, worker: FakeWorker, handle: AsyncJobHandle) -> tuple:
    """A stream that has token 1, is subscribed and waits for token 2; and the task that waits."""
    stream = handle.stream()
    await worker.commit(handle.job_id, 0, 1)
    await anext(stream)
    following = asyncio.ensure_future(anext(stream))
    [(hub, _)] = client._session.streams._readers.values()
    [[subscription]] = hub._subscriptions.values()

    async def is_quiet() -> bool:
        return await worker.publish(handle.job_id, tokens(1, 1)) and subscription.heard == (1, False)

    await wait_until_async(is_quiet, what="a stream that waits")
    return stream, following


async def test_a_flood_of_messages_is_no_flood_of_reads(
    client: AsyncClient, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
):
    num_reads, read = 0, LogReader.read

    async def counted(*args, **options):
        nonlocal num_reads
        num_reads += 1
        return await read(*args, **options)

    monkeypatch.setattr(LogReader, "read", counted)
    handle = await client.submit("hi")
    job_id = (await worker.take()).id
    stream, following = await quiet(client, worker, handle)
    clock = asyncio.get_running_loop().time
    began, num_reads = clock(), 0
    for number in range(2000):
        await worker.publish(job_id, tokens(1000 + number, 666))
    # Each read that brings nothing makes the next one wait for twice as long, up to the longest.
    assert num_reads <= 8 + (clock() - began) / LONGEST_SPACING_S
    await worker.run_from(job_id, 1, 2)
    assert (await following).token_ids == [2]
    await stream.aclose()


async def test_messages_do_not_keep_a_stream_from_looking_at_the_record(
    client: AsyncClient, worker: FakeWorker, redis: Redis, keys: Keys, monkeypatch: pytest.MonkeyPatch
):
    """Otherwise a job that is gone, overdue, or ended without a message would never end for its consumer."""
    monkeypatch.setattr("ingine.producer.streams.SILENCE_S", 0.1)
    handle = await client.submit("hi")
    job_id = (await worker.take()).id
    _stream, following = await quiet(client, worker, handle)
    await redis.delete(keys.job(job_id), keys.tokens(job_id))
    number, clock = 0, asyncio.get_running_loop().time
    ends_at = clock() + HANGS_S
    while not following.done():
        number += 1
        await worker.publish(job_id, tokens(1, 1) if number % 2 else tokens(number, 1))
        await asyncio.sleep(0)
        assert clock() < ends_at
    with pytest.raises(JobNotFound):
        await following


ODD_LOGS: dict[str, list[tuple[str, bytes]]] = {
    "a gap": [("1-0", tokens(1, 1)), ("3-0", tokens(3, 3))],
    "a gap at the start": [("2-0", tokens(2, 2))],
    "a repeat": [("1-0", tokens(1, 1)), ("2-0", tokens(2, 1, 2))],
    "an id of another position": [("1-0", tokens(1, 1)), ("5-0", tokens(2, 2))],
    "an id that no log has": [("1-0", tokens(1, 1)), ("1-5", tokens(2, 2))],
    "tokens at a terminal event's id": [("1-0", tokens(1, 1)), ("1-1", tokens(2, 2))],
    "an end at a token's id": [("1-0", tokens(1, 1)), ("2-0", end(2, "odd"))],
    "an end beyond the tokens": [("1-0", tokens(1, 1)), ("2-1", end(2, "odd"))],
    "an end of another job": [("1-0", tokens(1, 1)), ("1-1", end(1, "another"))],
    "an end in the middle": [("1-0", tokens(1, 1)), ("1-1", end(1, "odd")), ("2-0", tokens(2, 2))],
    "two ends": [("1-0", tokens(1, 1)), ("1-1", end(1, "odd")), ("1-2", end(1, "odd"))],
    "no event": [("1-0", b"\xc1")],
    "a type": [("1-0", msgpack.packb({"type": "tokens", "position": 1, "token_ids": "1", "text": ""}))],
}


@pytest.mark.parametrize("how", ODD_LOGS)
async def test_a_log_that_no_worker_wrote_is_an_error(
    client: AsyncClient, redis: Redis, keys: Keys, how: str
):
    for entry_id, event in ODD_LOGS[how]:
        await redis.xadd(keys.tokens("odd"), {EVENT_FIELD: event}, id=entry_id)
    for call in (client.attach("odd").result, lambda: all_of(client, "odd")):
        async with asyncio.timeout(HANGS_S):
            with pytest.raises(BadRecord, match="token log of job odd") as raised:
                await call()
        assert raised.value.code == "bad_record"


async def all_of(client: AsyncClient, job_id: str) -> list:
    return [chunk async for chunk in client.attach(job_id).stream()]


async def trimmed(redis: Redis, log: str, record: str) -> None:
    await redis.xtrim(log, maxlen=2, approximate=False)


async def deleted(redis: Redis, log: str, record: str) -> None:
    await redis.delete(log)


async def without_its_end(redis: Redis, log: str, record: str) -> None:
    await redis.xdel(log, "3-1")


async def ended_by_hand(redis: Redis, log: str, record: str) -> None:
    await redis.hset(record, "status", "running")


async def ended_otherwise(redis: Redis, log: str, record: str) -> None:
    await redis.hset(record, "status", "cancelled")


async def ended_elsewhere(redis: Redis, log: str, record: str) -> None:
    await redis.hset(record, "position", 2)


async def ended_before_its_log_does(redis: Redis, log: str, record: str) -> None:
    """Damage as of a job whose position was forged, and which was then buried."""
    await redis.xdel(log, "3-1")
    await redis.hset(record, mapping={"status": "failed", "position": 2})


async def ended_within_an_event(redis: Redis, log: str, record: str) -> None:
    """Like `ended_before_its_log_does`, with the record's position inside an event."""
    await redis.delete(log)
    await redis.xadd(log, {EVENT_FIELD: tokens(3, 1, 2, 3)}, id="3-0")
    await redis.hset(record, mapping={"status": "failed", "position": 1})


async def a_record_of_another_type(redis: Redis, log: str, record: str) -> None:
    await redis.delete(record)
    await redis.set(record, "x")


@pytest.mark.parametrize(
    "damage",
    [
        *(trimmed, deleted, without_its_end, ended_by_hand, ended_otherwise, ended_elsewhere),
        *(ended_before_its_log_does, ended_within_an_event, a_record_of_another_type),
    ],
)
async def test_a_log_and_a_record_that_do_not_agree_are_an_error(
    client: AsyncClient, worker: FakeWorker, redis: Redis, keys: Keys, damage: Callable
):
    """The error is raised even long after the job's end, without a wait for events that never come."""
    handle, other = await client.submit("hi"), await client.submit("hi")
    for job_id in [(await worker.take()).id for _ in range(2)]:
        await worker.run(job_id, 3)
    await damage(redis, keys.tokens(handle.job_id), keys.job(handle.job_id))
    async with asyncio.timeout(HANGS_S):
        results = await asyncio.gather(
            handle.result(), all_of(client, handle.job_id), other.result(), return_exceptions=True
        )
    assert [type(result) for result in results[:2]] == [BadRecord] * 2, results
    assert handle.job_id in str(results[0])
    assert results[2].token_ids == [1, 2, 3], "another job's stream, read with the same command"


async def test_a_record_of_another_type_has_no_status(client: AsyncClient, redis: Redis, keys: Keys):
    await redis.set(keys.job("odd"), "x")
    for call in (client.status, client.cancel):
        with pytest.raises(BadRecord, match="odd"):
            await call("odd")


@pytest.mark.parametrize(
    "fields",
    [
        {EVENT_FIELD: b"\xc1"},
        {EVENT_FIELD: tokens(1, 1)},
        {EVENT_FIELD: msgpack.packb({"type": "finished", "position": 1, "job_id": 5})},
        {EVENT_FIELD: msgpack.packb({"type": "finished", "position": 1, "job_id": "a", "usage": [1]})},
        {"other": b""},
    ],
    ids=str,
)
async def test_a_reply_that_no_worker_wrote_is_an_error_that_one_can_go_on_behind(
    client: AsyncClient, redis: Redis, keys: Keys, fields: dict
):
    odd = await redis.xadd(keys.replies("me"), fields)
    await redis.xadd(keys.replies("me"), {EVENT_FIELD: end(1, "good")})
    with pytest.raises(BadRecord, match=odd.decode()) as raised:
        await anext(client.replies("me"))
    assert raised.value.code == "bad_record"
    assert (await anext(client.replies("me", odd.decode()))).job_id == "good"


async def test_a_batch_has_an_error_for_the_line_and_goes_on(
    client: AsyncClient, worker: FakeWorker, redis: Redis, keys: Keys, tmp_path: Path
):
    class Silent:
        def start(self, total: int, num_done: int, num_failed: int) -> None:
            pass

        def advance(self, **counts: int) -> None:
            pass

    async def answer(worker: FakeWorker, job) -> None:
        await worker.commit(job.id, 0, 1)
        if job.prompt == "odd":
            await redis.xadd(keys.tokens(job.id), {EVENT_FIELD: tokens(1, 666)}, id="1-1")
        await worker.run_from(job.id, 1, 3)

    lines = [
        {"custom_id": name, "method": "POST", "url": "/v1/completions", "body": {"prompt": name}}
        for name in ("good", "odd", "well")
    ]
    tmp_path.joinpath("in").write_text("\n".join(map(json.dumps, lines)))
    paths = [tmp_path / name for name in ("in", "out", "errors")]
    serving = asyncio.create_task(worker.serve(answer))
    summary = await Batch(client, InputFile(paths[0]), *paths[1:], progress=Silent(), window=256).run()
    worker.stop()
    await serving
    assert (summary.num_lines, summary.num_failed) == (3, 1)
    [row] = map(json.loads, paths[2].read_text().splitlines())
    assert row["custom_id"] == "odd"
    assert row["response"]["body"]["error"]["code"] == "bad_record"


NUM_WALKS = 12


async def test_any_interleaving_gives_the_log_once_and_in_order(
    client: AsyncClient, server: Server, worker: FakeWorker, monkeypatch: pytest.MonkeyPatch
):
    """The channel has real and forged events, repeated, lost, late and out of order, and breaking
    connections, while the log grows."""
    monkeypatch.setattr("ingine.producer.streams.SILENCE_S", 0.05)
    for seed in range(NUM_WALKS):
        await Walk(seed, client, worker, drops=server.url is not None).run()


class Walk:
    """One job, its writer, its forger and three consumers. The seed determines what they do."""

    def __init__(self, seed: int, client: AsyncClient, worker: FakeWorker, *, drops: bool):
        self._draw = random.Random(seed)
        self._client, self._worker, self._drops = client, worker, drops
        self._position = 0
        self._late: list[bytes] = []

    async def run(self) -> None:
        handle = await self._client.submit("hi")
        self._job_id = (await self._worker.take()).id
        assert self._job_id == handle.job_id
        start = self._draw.randint(0, 3)
        streams = [asyncio.create_task(self._follow(position)) for position in (0, start)]
        result = asyncio.create_task(handle.result())
        for _ in range(self._draw.randint(4, 14)):
            await self._draw.choice([self._commit, self._commit, self._forge, self._say_again, self._drop])()
            await asyncio.sleep(self._draw.choice([0, 0, 0.002]))
        for _ in range(3 - self._position):
            await self._commit()
        await self._worker.publish(self._job_id, end(self._position, self._job_id, JobStatus.CANCELLED))
        await self._worker.end(self._job_id, self._position, text=".", publish=self._draw.random() < 0.5)
        await self._forge()
        every = [*range(1, self._position + 1)]
        async with asyncio.timeout(HANGS_S):
            whole, part = await asyncio.gather(*streams)
            of_result = await result
        assert whole == (every, "".join(f"<{n}>" for n in every) + ".")
        assert part[0] == every[start:]
        assert (of_result.token_ids, of_result.text) == whole

    async def _follow(self, position: int) -> tuple[list[int], str]:
        token_ids, text = [], ""
        async for chunk in self._client.attach(self._job_id, position).stream():
            assert chunk.position == position + len(chunk.token_ids)
            position = chunk.position
            token_ids += chunk.token_ids
            text += chunk.text
        return token_ids, text

    async def _commit(self) -> None:
        position = self._position + self._draw.randint(1, 3)
        event = await self._worker.commit(self._job_id, self._position, position, publish=False)
        self._position = position
        match self._draw.randrange(4):
            case 0:
                self._late.append(event)
            case 1:
                pass  # lost
            case times:
                for _ in range(times - 1):
                    await self._worker.publish(self._job_id, event)

    async def _say_again(self) -> None:
        """Publish an earlier event again: late, out of order, and perhaps repeatedly."""
        if self._late:
            await self._worker.publish(self._job_id, self._draw.choice(self._late))

    async def _forge(self) -> None:
        position = self._position + self._draw.randint(-2, 3)
        forged = [tokens(max(position, 1), 666), end(max(position, 0), self._job_id), b"\xc1", b""]
        forged += [end(self._position, self._job_id), end(self._position, "another"), tokens(1 << 60, 666)]
        await self._worker.publish(self._job_id, self._draw.choice(forged))

    async def _drop(self) -> None:
        if self._drops:
            kind = self._draw.choice(["pubsub", "normal"])
            await self._worker.redis.client_kill_filter(_type=kind, skipme=True)
