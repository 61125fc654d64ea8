"""Script calls that share a round trip: alone, most of what a call costs a worker is the trip."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.commands.core import AsyncScript
from redis.exceptions import NoScriptError


@dataclass(slots=True)
class _Call:
    script: AsyncScript
    keys: Sequence[str]
    args: Sequence[Any]
    answer: asyncio.Future


class Trips:
    """What several coroutines call at the same moment goes to the server together, in that order."""

    def __init__(self, redis: Redis):
        self._redis = redis
        self._waiting: list[_Call] = []
        self._under_way: set[asyncio.Task] = set()

    async def call(self, script: AsyncScript, *, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """What `script(keys=keys, args=args)` answers or raises. A broken connection is everybody's error."""
        call = _Call(script, keys, args, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        if len(self._waiting) == 1:
            trip = asyncio.create_task(self._go())
            self._under_way.add(trip)  # the loop itself holds tasks but weakly
            trip.add_done_callback(self._under_way.discard)
        return await call.answer

    async def _go(self) -> None:
        calls, self._waiting = self._waiting, []
        try:
            answers = await self._answers(calls)
        except Exception as error:
            answers = [error] * len(calls)
        for call, answer in zip(calls, answers, strict=True):
            if isinstance(answer, NoScriptError):  # the server is new, or has started anew
                answer = await _alone(call)
            if call.answer.done():  # cancelled
                continue
            if isinstance(answer, Exception):
                call.answer.set_exception(answer)
            else:
                call.answer.set_result(answer)

    async def _answers(self, calls: list[_Call]) -> list[Any]:
        """An answer or an error for each. Raises what breaks the trip."""
        if len(calls) == 1:
            return [await _alone(calls[0])]
        async with self._redis.pipeline(transaction=False) as pipeline:
            for call in calls:
                pipeline.evalsha(call.script.sha, len(call.keys), *call.keys, *call.args)
            return await pipeline.execute(raise_on_error=False)


async def _alone(call: _Call) -> Any:
    try:
        return await call.script(keys=call.keys, args=call.args)
    except Exception as error:
        return error
