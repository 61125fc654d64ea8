"""The cost of jobs for the worker's event loop before they run: other tasks run between any two pieces of
work."""

import asyncio
import contextlib

import msgpack

import ingine.worker.admission
from ingine.contract.events import TokensEvent
from ingine.contract.jobs import Job
from ingine.errors import ErrorCode, InvalidRequest
from ingine.sampling_params import SamplingParams
from ingine.worker.admission import INLINE_BYTES
from ingine.worker.queue import LOG_PAGE
from tests.worker.test_worker import GREEDY, leave_behind


@contextlib.asynccontextmanager
async def turns_of_the_loop():
    """A list of one number, that of the turns that the loop has taken."""
    turns = [0]

    async def count() -> None:
        while True:
            turns[0] += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    yield turns
    counting.cancel()


async def test_the_loop_comes_round_between_two_large_jobs(harness, monkeypatch):
    loser, seen = await harness(), []
    decode = ingine.worker.admission.decode_job
    async with turns_of_the_loop() as turns:

        def decode_and_look(raw, **limits):
            seen.append((turns[0], len(raw)))
            return decode(raw, **limits)

        monkeypatch.setattr(ingine.worker.admission, "decode_job", decode_and_look)
        # All at once, so that they are taken together.
        async with loser.redis.pipeline() as pipe:
            for number in range(6):
                raw = msgpack.packb({"id": f"{number}", "prompt": "x", "text": "x" * INLINE_BYTES})
                pipe.xadd(loser.keys.jobs("normal"), {"job": raw})
            await pipe.execute()
        for number in range(6):
            assert (await loser.end(f"{number}")).error["code"] == ErrorCode.UNKNOWN_FIELD
    turns_of_large_ones = [turn for turn, num_bytes in seen if num_bytes > INLINE_BYTES]
    assert len(set(turns_of_large_ones)) == len(turns_of_large_ones) == 6


async def test_the_loop_comes_round_while_a_long_log_is_read(harness, tiny_engine):
    """The engine is not to go on: the job has one token left to make."""
    num_tokens = 3 * LOG_PAGE + 10
    loser = await harness(tiny_engine())
    async with turns_of_the_loop() as turns:
        before, reads = turns[0], []
        xrange = loser.queue._redis.xrange

        async def xrange_and_look(*args, **options):
            page = await xrange(*args, **options)
            reads.append((turns[0], len(page)))
            return page

        loser.queue._redis.xrange = xrange_and_look
        log = [TokensEvent(position, [65], "a") for position in range(1, num_tokens + 1)]
        sampling = SamplingParams(temperature=0, max_tokens=num_tokens + 1, ignore_eos=True)
        await leave_behind(loser, Job(id="a", prompt="x", sampling=sampling), log)
        assert (await loser.end("a")).position == num_tokens + 1
    log_reads = [turn for turn, num_events in reads if num_events]
    assert before < min(log_reads) and len(set(log_reads)) == len(log_reads) >= 4
    assert max(num_events for _, num_events in reads) <= LOG_PAGE


async def test_what_an_error_quotes_is_cut(harness, monkeypatch):
    async def read(*_):
        raise InvalidRequest(ErrorCode.INVALID_MESSAGES, "x" * (1 << 20))

    loser = await harness()
    monkeypatch.setattr(loser.worker.prompts, "read", read)
    await loser.push(Job(id="a", prompt="x", sampling=GREEDY))
    end = await loser.end("a")
    assert end.error["code"] == ErrorCode.INVALID_MESSAGES and len(end.error["message"]) <= 500


async def test_of_an_entry_of_many_fields_and_no_job_a_few_are_buried(harness):
    num_fields, loser = 20_000, await harness()
    await loser.redis.xadd(
        loser.keys.jobs("normal"), {f"field-{number}": "x" for number in range(num_fields)}
    )
    await loser.push(Job(id="good", prompt="x", sampling=GREEDY))
    assert (await loser.end("good")).position == 24
    (dead,) = await loser.dead_letters()
    assert dead[b"code"] == b"invalid_shape"
    assert len(msgpack.unpackb(dead[b"job"], raw=True)) == 64
