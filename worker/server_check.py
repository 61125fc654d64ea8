"""Check that a server is of a kind that a worker can use, and knows every command that a worker needs.

The check runs once at start, in a few round trips that write nothing. A fault that waiting cannot repair ends
the start. One that may pass (the server loads its files, or is a replica that may be promoted) is waited out.
"""

import logging
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from redis import exceptions
from redis.asyncio import Redis

from ingine.connect.scripts import run_script
from ingine.connect.server_errors import WrongServer, is_lacking
from ingine.contract.calls.upkeep import may
from ingine.contract.keys import Keys
from ingine.contract.roles import Role, calls
from ingine.errors import ConfigError
from ingine.worker.logs import log_event

logger = logging.getLogger(__name__)

WANTED = "Use Redis 7 or later, or Valkey 8 or later, without rename-command"
RIGHTS = "give its user what `ingine acl worker` prints"
PLAIN = "the URL begins with redis:// or rediss:// there"
NEVER_PASSES = {
    "DB index is out of range": "name a database that it has, such as 0",
    "cluster support disabled": f"it is no cluster, so {PLAIN}",
    "'SENTINEL'": f"it is no Sentinel, so {PLAIN}",
}
"""Errors of a server that is of another kind than its URL says, each with a remedy."""


def needed_calls(keys: Keys) -> list[str]:
    """The commands that a worker and its scripts send, each once for every kind of key or channel."""
    return calls(Role.WORKER, keys)


def names_of(calls: list[str]) -> list[str]:
    """The names of the commands in these calls, each once. XGROUP CREATE is one name."""
    return list(dict.fromkeys(map(_name_of, calls)))


def _name_of(call: str) -> str:
    words = call.split()
    return " ".join(words[: 1 + (words[0] in ("XGROUP", "XINFO", "SCRIPT"))])


def _refusals(calls: list[str]) -> str:
    """A text with the commands of refused calls, each with the keys and channels that it is refused on.

    A key is named without the queue's prefix: `job:0` is the record of a job.
    """
    named: dict[str, list[str]] = defaultdict(list)
    for call in calls:
        named[_name_of(call)] += [word.partition("}:")[2] for word in call.split() if "}:" in word]
    return ", ".join(f"{name} ({', '.join(on)})" if on else name for name, on in named.items())


@dataclass
class _About:
    """What is known of a server."""

    name: str
    """Its kind, version and address, for messages."""
    mode: str = ""
    """`standalone`, `cluster` or `sentinel`."""
    lacking: list[str] = field(default_factory=list)
    """Commands that it does not know."""
    info: dict[str, Any] = field(default_factory=dict)
    """The fields of INFO; empty if the user may not run it."""


async def check_server(redis: Redis, where: str, keys: Keys) -> None:
    """Raise ConfigError, which names the server and its version, if the server refuses the login, lacks what
    a worker needs, or would delete jobs and logs. Raises RedisError if it cannot be asked yet.

    where: the server's URL without its password.
    """
    about = _About(f"the server at {where}")
    try:
        await _ask(redis, keys, about)
        if about.mode == "sentinel":
            raise _fault(about, "is a Sentinel: the URL begins with redis+sentinel:// there")
        if about.lacking:
            raise _fault(about, f"lacks {', '.join(about.lacking)}, or has renamed it. {WANTED}")
        refused = await run_script(redis, may(needed_calls(keys)))
    except (exceptions.ResponseError, exceptions.AuthenticationError, WrongServer) as error:
        if (remedy := _remedy(error, redis)) is None:
            raise
        raise _fault(about, f"says: {error}{remedy}") from None
    if refused:
        what = f"{_refusals(refused)} on keys and channels of {keys.prefix}"
        raise _fault(about, f"does not let its user run {what}: {RIGHTS}")
    _check_memory_and_disk(about)


def _fault(about: _About, what: str) -> ConfigError:
    return ConfigError(f"INGINE_REDIS_URL: {about.name} {what}")


async def _ask(redis: Redis, keys: Keys, about: _About) -> None:
    """Fill in `about` from HELLO, which every user may run, from INFO, and from a probe of each command.

    The probe sends each command without arguments: the server refuses it for their number before it checks
    anything else, unless the command is unknown. This also finds commands that a proxy does not know.
    """
    names = names_of(needed_calls(keys))
    pipe = redis.pipeline(transaction=False)
    # HGET is sent for its key, which another node of a cluster may have.
    pipe.execute_command("HELLO").info().hget(keys.settings, "partitions")
    for name in names:
        pipe.execute_command(name)
    hello, info, _, *answers = await pipe.execute(raise_on_error=False)
    if isinstance(hello, list):
        words = [part.decode() if isinstance(part, bytes) else part for part in hello]
        said = dict(zip(words[::2], words[1::2], strict=True))
        about.name = about.name.replace("the server", f"{said['server']} {said['version']}", 1)
        about.mode = said["mode"]
    if isinstance(info, dict):
        about.info = info
    about.lacking = [name for name, answer in zip(names, answers, strict=True) if is_lacking(answer)]


def _remedy(error: exceptions.RedisError, redis: Redis) -> str | None:
    """The end of the message for an error that waiting cannot repair; None if the error may pass."""
    for sign, remedy in NEVER_PASSES.items():
        if sign in str(error):
            return f": {remedy}"
    match error:
        case exceptions.AuthenticationError():
            return ""
        case exceptions.NoPermissionError():
            return f": {RIGHTS}"
        case WrongServer() if isinstance(error.__cause__, exceptions.MovedError) and not _asks_its_way(redis):
            return "; it is a node of a cluster"
        case _:
            return f". {WANTED}" if is_lacking(error) else None


def _asks_its_way(redis: Redis) -> bool:
    """Whether the client looks up the server to use, as in a cluster and behind Sentinel."""
    return redis.connection_pool.connection_kwargs.get("find") is not None


def _check_memory_and_disk(about: _About) -> None:
    policy = about.info.get("maxmemory_policy", "")
    if policy.startswith("allkeys-"):
        raise _fault(about, f"has maxmemory-policy {policy}: it would delete jobs and logs. Set noeviction")
    if about.info.get("aof_enabled") == 0:
        lost = "jobs, token logs and results since its last snapshot"
        name = about.name
        log_event(logger, logging.WARNING, "redis is not durable", redis=name, appendonly="no", loses=lost)
