"""Whether a server can serve a worker: what it is, and whether it knows every command that a worker needs.

Asked once at a start, in a few round trips that write nothing. What waiting will not mend ends the start;
what may pass (a server that loads its files, a replica that may be promoted) is waited for.
"""

import logging
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from redis import exceptions
from redis.asyncio import Redis

from ingine.connect.scripts import load_script
from ingine.connect.servers import WrongServer, is_lacking
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
"""What a server answers that is another than the URL says, and what to do."""


def needed_calls(keys: Keys) -> list[str]:
    """Each command that a worker or one of its scripts sends, with a key or channel of each kind for it."""
    return calls(Role.WORKER, keys)


def names_of(calls: list[str]) -> list[str]:
    """The commands of these calls, each once: XGROUP CREATE counts as one."""
    return list(dict.fromkeys(map(_name_of, calls)))


def _name_of(call: str) -> str:
    words = call.split()
    return " ".join(words[: 1 + (words[0] in ("XGROUP", "XINFO", "SCRIPT"))])


def _refusals(calls: list[str]) -> str:
    """The commands of these calls, each with the keys and channels that it is refused on.

    A key is named by what comes behind the queue's prefix: `job:0` is the record of a job.
    """
    named: dict[str, list[str]] = defaultdict(list)
    for call in calls:
        named[_name_of(call)] += [word.partition("}:")[2] for word in call.split() if "}:" in word]
    return ", ".join(f"{name} ({', '.join(on)})" if on else name for name, on in named.items())


@dataclass
class _About:
    """What a server says of itself."""

    name: str
    """With its version, and where it is."""
    mode: str = ""
    """`standalone`, `cluster` or `sentinel`."""
    lacking: list[str] = field(default_factory=list)
    """Commands that it does not know."""
    info: dict[str, Any] = field(default_factory=dict)
    """Of INFO; empty where it is forbidden to us, which speaks for whoever set the server up."""


async def check_server(redis: Redis, where: str, keys: Keys) -> None:
    """Raises ConfigError, naming the server with its version, if it lets nobody in, cannot do what a worker
    needs, or would throw jobs and logs away; RedisError if it cannot be asked yet.

    where: the server as it may be shown.
    """
    about = _About(f"the server at {where}")
    try:
        await _ask(redis, keys, about)
        if about.mode == "sentinel":
            raise _fault(about, "is a Sentinel: the URL begins with redis+sentinel:// there")
        if about.lacking:
            raise _fault(about, f"lacks {', '.join(about.lacking)}, or has renamed it. {WANTED}")
        refused = await load_script(redis, "may")(args=needed_calls(keys))
    except (exceptions.ResponseError, exceptions.AuthenticationError, WrongServer) as error:
        if (remedy := _remedy(error, redis)) is None:
            raise
        raise _fault(about, f"says: {error}{remedy}") from None
    if refused:
        what = f"{_refusals([call.decode() for call in refused])} on keys and channels of {keys.prefix}"
        raise _fault(about, f"does not let its user run {what}: {RIGHTS}")
    _check_memory_and_disk(about)


def _fault(about: _About, what: str) -> ConfigError:
    return ConfigError(f"INGINE_REDIS_URL: {about.name} {what}")


async def _ask(redis: Redis, keys: Keys, about: _About) -> None:
    """HELLO, which every user may ask; INFO; and which commands are unknown.

    A command without arguments is refused for their number, before anything else, unless it is unknown. That
    goes through a proxy too, which may know less than the server behind it.
    """
    names = names_of(needed_calls(keys))
    pipe = redis.pipeline(transaction=False)
    # The last of them is about a key, which another node of a cluster may have.
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
    """The end of a message about what waiting will not mend. None: it may."""
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
    """Whether its connections ask where to go, as they do in a cluster and behind Sentinel."""
    return redis.connection_pool.connection_kwargs.get("find") is not None


def _check_memory_and_disk(about: _About) -> None:
    policy = about.info.get("maxmemory_policy", "")
    if policy.startswith("allkeys-"):
        raise _fault(about, f"has maxmemory-policy {policy}: it would delete jobs and logs. Set noeviction")
    if about.info.get("aof_enabled") == 0:
        lost = "jobs, token logs and results since its last snapshot"
        name = about.name
        log_event(logger, logging.WARNING, "redis is not durable", redis=name, appendonly="no", loses=lost)
