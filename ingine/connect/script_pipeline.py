"""Script calls in as few round trips as can be: most of what a call costs a worker is the round trip.

They are sent and read on a connection of the client's pool. What redis-py does around each command and each
pipeline beside that (counting, timing, trying again, which workers do by themselves) takes as long again.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError, ResponseError

from ingine.connect.scripts import Script


@dataclass(slots=True)
class _Call:
    script: Script
    keys: Sequence[str]
    args: Sequence[Any]
    answer: asyncio.Future | None = None
    """None: no other call shares its round trip."""


class ScriptPipeline:
    """What several coroutines call at the same moment goes to the server together, in that order."""

    def __init__(self, redis: Redis):
        self._redis = redis
        self._waiting: list[_Call] = []
        self._flushes: set[asyncio.Task] = set()

    async def call(self, script: Script, *, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """What `script(keys=keys, args=args)` answers or raises. A broken connection is everybody's error."""
        call = _Call(script, keys, args, asyncio.get_running_loop().create_future())
        self._waiting.append(call)
        if len(self._waiting) == 1:
            flush = asyncio.create_task(self._flush())
            self._flushes.add(flush)  # the loop itself holds tasks but weakly
            flush.add_done_callback(self._flushes.discard)
        return await call.answer

    async def call_alone(self, script: Script, *, keys: Sequence[str], args: Sequence[Any]) -> Any:
        """As `call`, in a round trip of its own: large calls do not wait for each other's answers."""
        (answer,) = await self._answers([_Call(script, keys, args)])
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def _flush(self) -> None:
        calls, self._waiting = self._waiting, []
        try:
            answers = await self._answers(calls)
        except Exception as error:
            answers = [error] * len(calls)
        for call, answer in zip(calls, answers, strict=True):
            if call.answer.done():  # cancelled
                continue
            if isinstance(answer, Exception):
                call.answer.set_exception(answer)
            else:
                call.answer.set_result(answer)

    async def _answers(self, calls: list[_Call]) -> list[Any]:
        """An answer or an error for each. Raises what breaks the round trip."""
        answers = await self._exchange(calls)
        for number, answer in enumerate(answers):
            if isinstance(answer, NoScriptError):  # the server is new, or has started anew
                answers[number] = await _load_and_call(calls[number])
        return answers

    async def _exchange(self, calls: list[_Call]) -> list[Any]:
        pool = self._redis.connection_pool
        connection = await pool.get_connection()
        try:
            commands = [
                ("EVALSHA", call.script.sha, len(call.keys), *call.keys, *call.args) for call in calls
            ]
            await connection.send_packed_command(connection.pack_commands(commands))
            # Whatever is no answer of the server, a cancellation too, closes the connection: no answer is
            # left in it for whoever has it next.
            return [await _read_answer(connection) for _ in calls]
        finally:
            await pool.release(connection)


async def _read_answer(connection: AbstractConnection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error


async def _load_and_call(call: _Call) -> Any:
    try:
        return await call.script(keys=call.keys, args=call.args)
    except Exception as error:
        return error
