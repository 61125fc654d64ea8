"""The contract's Lua scripts on a server: each is sent once, and known there by its hash from then on."""

from redis.asyncio import Redis
from redis.commands.core import AsyncScript as Script

from ingine.contract.scripts import read_script

__all__ = ["Script", "load_script"]


def load_script(redis: Redis, name: str) -> Script:
    """`ingine.contract.scripts`' script of this name, for any server that `redis` is connected to."""
    return redis.register_script(read_script(name))
