"""Two lanes carry what the engine makes, and nothing overtakes what belongs before it."""

import asyncio
from collections import defaultdict
from dataclasses import dataclass

import pytest

from tests.waiting import wait_until_async
from worker.engine_link import EngineFailure
from worker.lanes import NUM_LANES, Lanes


@dataclass
class Output:
    seq_id: str
    position: int


NAMES = [f"job-{number}#1" for number in range(20)]


async def driven(commit, steps) -> tuple[int, asyncio.Task, Lanes]:
    num_committed = 0

    def committed() -> None:
        nonlocal num_committed
        num_committed += 1

    lanes = Lanes(commit, committed)
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
        for output in part:
            seen[output.seq_id].append(output.position)

    steps = [[Output(name, position) for name in NAMES] for position in range(1, 9)]
    steps.append([Output(NAMES[0], 9)])  # of which one lane has nothing
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

    lanes = Lanes(commit, lambda: order.append("committed"))
    lanes.deliver([Output(name, 1) for name in NAMES])
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
    _, running, _ = await driven(commit, [[Output(name, 1) for name in NAMES], failure])
    running.cancel()
    failures = [part for part in seen if isinstance(part, EngineFailure)]
    assert sorted(name for part in failures for name in part.seq_ids) == sorted(NAMES)
    assert all(part.fatal for part in failures)
    for part in failures:
        outputs = next(other for other in seen if isinstance(other, list) and other[0].seq_id in part.seq_ids)
        assert {output.seq_id for output in outputs} == set(part.seq_ids)
        assert seen.index(outputs) < seen.index(part)


async def test_a_lane_that_breaks_ends_both():
    async def commit(part):
        raise ZeroDivisionError

    lanes = Lanes(commit, lambda: None)
    lanes.deliver([Output(name, 1) for name in NAMES])
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
