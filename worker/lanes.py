"""Steps on their way to Redis, in lanes: while one waits for its answer, the other is being sent.

A sequence always has the same lane, which commits one part after the other, so its tokens keep their
order. With one lane, the loop's work on a token and the server's would add up.

What has come in while a lane was busy is committed together, as one event a sequence. So where the engine is
faster than the way to Redis, events get more tokens, and a token costs less.
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
    """What is left to commit of one."""

    num_parts: int


class Lanes:
    """`commit` is awaited for each part of what is delivered, `committed` called when all parts of it are.

    `may_join`: whether what several steps added to a sequence may be one event.
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
        """From the engine, in the order in which it computed."""
        if isinstance(message, EngineFailure):
            parts = [[] for _ in self._lanes]
            for number, seq_ids in enumerate(_split(message.seq_ids, str)):
                # Without any: whoever made the failure could not say which sequences it concerns.
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
        """Until all that was delivered is committed."""
        for lane in self._lanes:
            await lane.join()

    async def _drive(self, lane: asyncio.Queue[tuple[StepMessage, _Step]]) -> None:
        while True:
            waiting = [await lane.get()]
            while not lane.empty():
                waiting.append(lane.get_nowait())
            # A failure is committed by itself, in its place.
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
        """Parts of steps in a row: all that may be joined in the first one, the rest as it is."""
        if len(parts) == 1:
            return parts
        joined: dict[str, SeqOutput] = {}
        turns: list[list[SeqOutput]] = [[] for _ in parts]
        for part, turn in zip(parts, turns, strict=True):
            for output in part:
                if not self._may_join(output.seq_id):
                    turn.append(output)
                elif earlier := joined.get(output.seq_id):
                    joined[output.seq_id] = earlier.followed_by(output)
                else:
                    joined[output.seq_id] = output
        turns[0] += joined.values()
        return turns


def _seq_id(output: SeqOutput) -> str:
    return output.seq_id


def _split(items: Iterable[T], seq_id: Callable[[T], str]) -> list[list[T]]:
    parts: list[list[T]] = [[] for _ in range(NUM_LANES)]
    for item in items:
        parts[hash(seq_id(item)) % NUM_LANES].append(item)
    return parts
