"""Commit steps in lanes: while one lane waits for the server's answer, the other sends.

A sequence always has the same lane, which commits one part after the other, so its tokens keep their
order. With a single lane, the event loop's time for a token and the server's would add up.

Steps that arrive while a lane is busy are committed together, with one event per choice of a job. So if the
engine is faster than the commits, events hold more tokens, and a token costs less.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TypeVar

from ingine.engine.outputs import SeqOutput
from ingine.worker.hosting.engine_link import EngineFailure, StepMessage

NUM_LANES = 2

T = TypeVar("T")


@dataclass(slots=True)
class _Step:
    num_parts: int
    """Parts that are not committed yet."""


class Lanes:
    """Splits each message into one part per lane. `commit` is awaited for each part that is not empty, and
    `committed` is called when all parts of a message are committed.

    `may_join(seq_id)` returns whether the outputs of several steps may become one event of that sequence.
    """

    def __init__(
        self,
        commit: Callable[[StepMessage], Awaitable[None]],
        committed: Callable[[], None],
        may_join: Callable[[str], bool],
    ):
        self._commit = commit
        self._committed = committed
        self._may_join = may_join
        self._lanes: list[asyncio.Queue[tuple[StepMessage, _Step]]] = [
            asyncio.Queue() for _ in range(NUM_LANES)
        ]

    def deliver(self, message: StepMessage) -> None:
        """Enqueue a message of the engine. Call it in the order in which the engine computed."""
        if isinstance(message, EngineFailure):
            parts = [[] for _ in self._lanes]
            for number, seq_ids in enumerate(_split(message.seq_ids, str)):
                # A failure without sequences, where these are unknown, goes to the first lane.
                if seq_ids or (not message.seq_ids and number == 0):
                    parts[number] = EngineFailure(seq_ids, message.error, message.fatal)
        else:
            parts = _split(message, _seq_id)
        step = _Step(NUM_LANES)
        for lane, part in zip(self._lanes, parts, strict=True):
            lane.put_nowait((part, step))

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for lane in self._lanes:
                group.create_task(self._drive(lane))

    async def join(self) -> None:
        """Wait until all delivered messages are committed."""
        for lane in self._lanes:
            await lane.join()

    async def _drive(self, lane: asyncio.Queue[tuple[StepMessage, _Step]]) -> None:
        while True:
            waiting = [await lane.get()]
            while not lane.empty():
                waiting.append(lane.get_nowait())
            # A failure is committed by itself, between the steps before and after it.
            for is_failure, group in groupby(waiting, lambda each: isinstance(each[0], EngineFailure)):
                parts, steps = zip(*group, strict=True)
                for part in filter(None, parts if is_failure else self._join(parts)):
                    await self._commit(part)
                for step in steps:
                    step.num_parts -= 1
                    if not step.num_parts:
                        self._committed()
                    lane.task_done()

    def _join(self, parts: Sequence[list[SeqOutput]]) -> Sequence[list[SeqOutput]]:
        """Merge parts of successive steps: outputs that may be joined go into the first part, the others stay
        where they are."""
        if len(parts) == 1:
            return parts
        joined: dict[tuple[str, int], SeqOutput] = {}
        turns: list[list[SeqOutput]] = [[] for _ in parts]
        for part, turn in zip(parts, turns, strict=True):
            for output in part:
                if not self._may_join(output.seq_id):
                    turn.append(output)
                    continue
                choice = output.seq_id, output.index
                earlier = joined.get(choice)
                joined[choice] = earlier.followed_by(output) if earlier else output
        turns[0] += joined.values()
        return turns


def _seq_id(output: SeqOutput) -> str:
    return output.seq_id


def _split(items: Iterable[T], seq_id: Callable[[T], str]) -> list[list[T]]:
    parts: list[list[T]] = [[] for _ in range(NUM_LANES)]
    for item in items:
        parts[hash(seq_id(item)) % NUM_LANES].append(item)
    return parts
