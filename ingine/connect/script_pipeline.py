"""Make script calls in as few round trips as possible: the round trip is most of what a call costs a worker.

Calls are sent, and their replies read, on a connection of the client's pool. What redis-py does around each
command and each pipeline (counting, timing, and retries, which workers make themselves) takes as long again.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import NoScriptError, ResponseError

from ingine.connect.scripts import script_of
from ingine.contract.calls.script_call import Reply, ScriptCall


@dataclass(frozen=True, slots=True)
class _Waiting:
    call: ScriptCall
    reply: asyncio.Future


class ScriptPipeline:
    """Makes script calls on one server, and sends those of several coroutines together, in their order."""

    def __init__(self, redis: Redis):
        self._redis = redis
        self._waiting: list[_Waiting] = []
        self._flushes: set[asyncio.Task] = set()

    async def call(self, call: ScriptCall[Reply]) -> Reply:
        """Make `call` and return its reply, decoded. Raises RedisError.

        It shares a round trip with the other calls of this turn of the event loop. If the connection breaks,
        all of them raise that error.
        """
        waiting = _Waiting(call, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if len(self._waiting) == 1:
            flush = asyncio.create_task(self._flush())
            self._flushes.add(flush)  # the event loop holds only a weak reference to a task
            flush.add_done_callback(self._flushes.discard)
        return call.read_reply(await waiting.reply)

    async def call_alone(self, call: ScriptCall[Reply]) -> Reply:
        """Make `call` like `call`, in a round trip of its own: large calls do not wait for other replies."""
        (reply,) = await self._replies([call])
        if isinstance(reply, Exception):
            raise reply
        return call.read_reply(reply)

    async def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        try:
            replies = await self._replies([each.call for each in waiting])
        except Exception as error:
            replies = [error] * len(waiting)
        for each, reply in zip(waiting, replies, strict=True):
            if each.reply.done():  # cancelled
                continue
            if isinstance(reply, Exception):
                each.reply.set_exception(reply)
            else:
                each.reply.set_result(reply)

    async def _replies(self, calls: Sequence[ScriptCall]) -> list[Any]:
        """Return a raw reply or an error for each call. Raises the error of a broken connection."""
        replies = await self._exchange(calls)
        for number, reply in enumerate(replies):
            if isinstance(reply, NoScriptError):  # the server is new, or has restarted
                replies[number] = await self._load_and_call(calls[number])
        return replies

    async def _exchange(self, calls: Sequence[ScriptCall]) -> list[Any]:
        pool = self._redis.connection_pool
        connection = await pool.get_connection()
        try:
            commands = [
                ("EVALSHA", script_of(call.source).sha, len(call.keys), *call.keys, *call.args)
                for call in calls
            ]
            await connection.send_packed_command(connection.pack_commands(commands))
            # Any exception but a server's error reply, a cancellation too, closes the connection: no reply
            # remains in it for the coroutine that uses it next.
            return [await _read_reply(connection) for _ in calls]
        finally:
            await pool.release(connection)

    async def _load_and_call(self, call: ScriptCall) -> Any:
        try:
            return await script_of(call.source)(keys=call.keys, args=call.args, client=self._redis)
        except Exception as error:
            return error


async def _read_reply(connection: AbstractConnection) -> Any:
    try:
        return await connection.read_response()
    except ResponseError as error:
        return error
