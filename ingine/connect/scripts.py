"""Run calls of the contract's Lua scripts, one by one or many in one round trip.

A script is sent to a server once, and is called by its hash from then on.
"""

from collections.abc import Sequence
from functools import cache

from redis.asyncio import Redis
from redis.commands.core import AsyncScript as Script
from redis.exceptions import NoScriptError, RedisError

from ingine.contract.calls.script_call import Reply, ScriptCall

MAX_TRIPS = 3
"""Round trips for the same calls, while the server loses their script."""


@cache
def script_of(source: str) -> Script:
    """Return the script with this source. It belongs to no client: name one in each call."""
    return Script(None, source.encode())


async def run_script(redis: Redis, call: ScriptCall[Reply]) -> Reply:
    """Make `call` and return its reply, decoded. Raises RedisError."""
    reply = await script_of(call.source)(keys=call.keys, args=call.args, client=redis)
    return call.read_reply(reply)


async def run_together(redis: Redis, calls: Sequence[ScriptCall[Reply]]) -> list[Reply | RedisError]:
    """Make calls that may be repeated, in one round trip. Returns the reply or the error of each.

    Another round trip follows where the server lost a script after the pipeline had found it there, as a
    server does that restarts. Where it loses the script each time, the errors say so.
    """
    for _ in range(MAX_TRIPS):
        pipeline = redis.pipeline(transaction=False)
        for call in calls:
            await script_of(call.source)(keys=call.keys, args=call.args, client=pipeline)
        replies = await pipeline.execute(raise_on_error=False)
        if not any(isinstance(reply, NoScriptError) for reply in replies):
            break
    return [
        reply if isinstance(reply, Exception) else call.read_reply(reply)
        for call, reply in zip(calls, replies, strict=True)
    ]
