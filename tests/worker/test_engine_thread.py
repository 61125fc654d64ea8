"""The engine's thread by itself: what it delivers while nobody takes it, and when it counts as broken."""

from contextlib import asynccontextmanager

import pytest

from ingine.engine.request import EngineRequest
from ingine.sampling_params import SamplingParams
from ingine.worker.hosting.engine_link import EngineFailure
from ingine.worker.hosting.engine_thread import MAX_FAILED_STEPS, MAX_STEPS_AHEAD, EngineThread
from tests.waiting import wait_until_async
from tests.worker.test_failures import break_steps

LONG = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)


@asynccontextmanager
async def running(engine):
    """The thread, and all that it has delivered."""
    delivered, thread = [], EngineThread(lambda: engine)
    await thread.start(delivered.append)
    try:
        yield thread, delivered
    finally:
        await thread.stop()
        thread.close()


def add(thread: EngineThread, seq_id: str) -> None:
    thread.add(EngineRequest(seq_id, [65, 66], LONG, arrival_time=0.0))


@pytest.mark.parametrize("is_async", [False, True], ids=["a step at a time", "a step ahead"])
async def test_after_a_step_that_is_dropped_nothing_is_delivered(tiny_engine, is_async):
    """The server stalls as the thread is told to stop, and then takes steps again."""
    engine = tiny_engine(async_scheduling=is_async)
    drain, stats, drained = engine.drain, engine.stats, []

    def drain_with_credits():
        outputs = drain()
        if thread._stopping:
            for _ in range(10):
                thread.credit()
            drained.append(outputs)
        return outputs

    engine.drain = drain_with_credits
    async with running(engine) as (thread, delivered):
        add(thread, "a")
        one_more = MAX_STEPS_AHEAD + 1
        await wait_until_async(lambda: stats().num_output_tokens >= one_more, what="a step too many")
        await wait_until_async(lambda: len(delivered) == MAX_STEPS_AHEAD, what="those that fit")
        await thread.stop()
        assert bool(drained[-1]) is is_async, "a step ahead, one more comes as the engine stops"
        positions = [output.position for outputs in delivered for output in outputs]
        assert positions == list(range(1, MAX_STEPS_AHEAD + 1))


async def test_lone_steps_that_keep_failing_break_the_engine(tiny_engine, monkeypatch):
    engine = tiny_engine()
    break_steps(engine, monkeypatch, lambda ids: True)
    async with running(engine) as (thread, delivered):
        for number in range(1, MAX_FAILED_STEPS + 1):
            assert thread.alive
            add(thread, f"s{number}")
            await wait_until_async(lambda: len(delivered) == number, what=f"failure {number}")  # noqa: B023
            thread.credit()
        await wait_until_async(lambda: not thread.alive, what="the thread's end")
    assert [failure.fatal for failure in delivered] == [False] * (MAX_FAILED_STEPS - 1) + [True]
    assert [failure.seq_ids for failure in delivered] == [[f"s{n}"] for n in range(1, MAX_FAILED_STEPS + 1)]


@pytest.mark.parametrize("healed_by", ["a step that goes well", "a neighbour that goes on alone"])
async def test_failures_count_in_a_row_only(tiny_engine, monkeypatch, healed_by):
    engine = tiny_engine()
    break_steps(engine, monkeypatch, lambda ids: any(seq_id.startswith("poison") for seq_id in ids))
    async with running(engine) as (thread, delivered):

        async def fail(number: int) -> None:
            add(thread, f"poison-{number}")
            await wait_until_async(lambda: num_failures() == number, what=f"failure {number}")

        def num_failures() -> int:
            while thread._credits._value < MAX_STEPS_AHEAD:
                thread.credit()
            return sum(isinstance(message, EngineFailure) for message in delivered)

        for number in range(1, MAX_FAILED_STEPS):
            await fail(number)
        if healed_by == "a step that goes well":
            add(thread, "good")
            await wait_until_async(lambda: num_failures() < len(delivered), what="an output")
            thread.abort("good")
            done = num_failures()
        else:
            thread._enqueue("", lambda: (add_now(engine, "good", 1), add_now(engine, "poison-0", 50))[0])
            done = MAX_FAILED_STEPS
            await wait_until_async(lambda: num_failures() == done, what="one more")
        await fail(done + 1)
        assert thread.alive
        assert not any(isinstance(message, EngineFailure) and message.fatal for message in delivered)


def add_now(engine, seq_id: str, max_tokens: int):
    """Between two steps, so that several are in one."""
    params = LONG.model_copy(update={"max_tokens": max_tokens})
    return engine.add(EngineRequest(seq_id, [65, 66], params, arrival_time=0.0))
