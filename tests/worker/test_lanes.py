"""Two lanes carry what the engine makes, and nothing overtakes what belongs before it."""

import asyncio
from collections import defaultdict

import pytest

import ingine.worker.lanes
from ingine.engine.outputs import FinishReason, SeqOutput
from ingine.worker.hosting.engine_link import EngineFailure
from ingine.worker.lanes import NUM_LANES, Lanes
from tests.waiting import wait_until_async

NAMES = [f"job-{number}#1" for number in range(20)]


def output(seq_id: str, position: int, **more) -> SeqOutput:
    return SeqOutput(seq_id, position, [position], f"<{position}>", 3, num_cached_tokens=2, **more)


def may_join(seq_id: str) -> bool:
    return seq_id.endswith("#1")


async def driven(commit, steps) -> tuple[int, asyncio.Task, Lanes]:
    num_committed = 0

    def committed() -> None:
        nonlocal num_committed
        num_committed += 1

    lanes = Lanes(commit, committed, may_join)
    for step in steps:
        lanes.deliver(step)
    running = asyncio.create_task(lanes.run())
    await lanes.join()
    return num_committed, running, lanes


async def test_each_sequence_keeps_its_order_however_long_a_commit_takes():
    seen = defaultdict(list)

    async def commit(part):
        assert part, "nothing is nobody's to commit"
        for _ in range(len(part) % 3):
            await asyncio.sleep(0)
        for of_seq in part:
            seen[of_seq.seq_id] += of_seq.token_ids

    steps = [[output(name, position) for name in NAMES] for position in range(1, 9)]
    steps.append([output(NAMES[0], 9)])  # of which one lane has nothing
    seen_whole = {tuple(range(1, 9)), tuple(range(1, 10))}
    num_committed, running, _ = await driven(commit, steps)
    running.cancel()
    assert num_committed == len(steps)
    assert {tuple(positions) for positions in seen.values()} == seen_whole
    assert set(seen) == set(NAMES)


async def test_a_step_counts_as_committed_when_all_of_it_is():
    go_on, under_way, order = asyncio.Event(), 0, []

    async def commit(part):
        nonlocal under_way
        under_way += 1
        if under_way == 1:
            await go_on.wait()

    lanes = Lanes(commit, lambda: order.append("committed"), may_join)
    lanes.deliver([output(name, 1) for name in NAMES])
    running = asyncio.create_task(lanes.run())
    await wait_until_async(lambda: under_way == NUM_LANES, what="both lanes at once")
    assert not order
    go_on.set()
    await lanes.join()
    running.cancel()
    assert order == ["committed"]


async def test_a_failure_comes_after_what_its_sequences_had_made():
    seen = []

    async def commit(part):
        seen.append(part)

    failure = EngineFailure(NAMES, RuntimeError("broke"), fatal=True)
    _, running, _ = await driven(commit, [[output(name, 1) for name in NAMES], failure])
    running.cancel()
    failures = [part for part in seen if isinstance(part, EngineFailure)]
    assert sorted(name for part in failures for name in part.seq_ids) == sorted(NAMES)
    assert all(part.fatal for part in failures)
    for part in failures:
        outputs = next(other for other in seen if isinstance(other, list) and other[0].seq_id in part.seq_ids)
        assert {of_seq.seq_id for of_seq in outputs} == set(part.seq_ids)
        assert seen.index(outputs) < seen.index(part)


async def committed_after(first, rest) -> list:
    """The parts of one lane, if `rest` comes in while it commits `first`."""
    go_on, parts = asyncio.Event(), []

    async def commit(part):
        parts.append(part)
        await go_on.wait()

    lanes = Lanes(commit, lambda: None, may_join)
    lanes.deliver(first)
    running = asyncio.create_task(lanes.run())
    await wait_until_async(lambda: parts, what="the first commit")
    for message in rest:
        lanes.deliver(message)
    go_on.set()
    await lanes.join()
    running.cancel()
    return parts


async def test_what_comes_in_while_a_lane_is_busy_is_committed_as_one_event_a_sequence():
    name, late, *_ = [name for name in NAMES if hash(name) % NUM_LANES == 0]
    rest = [
        [output(name, 2, logprobs=[{"token_id": 2}])],
        [output(late, 1), output(name, 3, logprobs=[{"token_id": 3}])],
        [SeqOutput(name, 3, [], "", 3, 2, finish_reason=FinishReason.ABORT, final_text="held back")],
    ]
    _, joined = await committed_after([output(name, 1, logprobs=[{"token_id": 1}])], rest)
    assert joined == [
        SeqOutput(
            name,
            position=3,
            token_ids=[2, 3],
            text="<2><3>",
            num_prompt_tokens=3,
            num_cached_tokens=2,
            logprobs=[{"token_id": 2}, {"token_id": 3}],
            finish_reason=FinishReason.ABORT,
            final_text="held back",
        ),
        output(late, 1),
    ]


async def test_what_may_not_be_joined_is_committed_step_by_step(monkeypatch):
    monkeypatch.setattr(ingine.worker.lanes, "NUM_LANES", 1)
    first, later = "a#1", "b#2"
    rest = [[output(first, number), output(later, number)] for number in (2, 3, 4)]
    rest.append([output(first, 5)])
    _, *parts = await committed_after([output(first, 1), output(later, 1)], rest)
    assert [[(of_seq.seq_id, of_seq.token_ids) for of_seq in part] for part in parts] == [
        [(later, [2]), (first, [2, 3, 4, 5])],
        [(later, [3])],
        [(later, [4])],
    ]


async def test_steps_are_not_joined_across_a_failure():
    name = NAMES[0]
    failure = EngineFailure([name], RuntimeError("broke"))
    rest = [[output(name, 2)], [output(name, 3)], failure, failure, [output(name, 4)]]
    _, before, *failures, after = await committed_after([output(name, 1)], rest)
    assert [of_seq.token_ids for of_seq in before] == [[2, 3]]
    assert failures == [failure, failure]
    assert [of_seq.token_ids for of_seq in after] == [[4]]


async def test_a_lane_that_breaks_ends_both():
    async def commit(part):
        raise ZeroDivisionError

    lanes = Lanes(commit, lambda: None, may_join)
    lanes.deliver([output(name, 1) for name in NAMES])
    with pytest.raises(ExceptionGroup, match="TaskGroup"):
        await lanes.run()


@pytest.mark.parametrize("seq_ids", [[], NAMES[:1], NAMES], ids=len)
async def test_a_failure_concerns_no_other_sequences_than_those_that_it_names(seq_ids):
    """One without any concerns all that there are, so no part may be without by accident."""
    parts = []

    async def commit(part):
        parts.append(part.seq_ids)

    num_committed, running, _ = await driven(commit, [EngineFailure(seq_ids, RuntimeError(), True)])
    running.cancel()
    assert num_committed == 1
    assert sorted(seq_id for part in parts for seq_id in part) == sorted(seq_ids)
    assert all(parts) if seq_ids else parts == [[]]
