"""The rights of each role at a server: its commands, for each kind of key and channel, and no others.

`user_line` writes them as a line of the server's access list, `calls` as commands to ask a server about.
Needs nothing but the standard library.

A server checks a script twice: EVALSHA with all keys that it names, and then each command that it runs.
With one list of commands and one of keys, a role could run each of its commands on each of its keys, in a
script of its own: a submitter reads the queue's settings, and could write them too. Hence selectors (Redis 7,
Valkey 8): a command is allowed if one selector has both the command and its keys. One lets EVALSHA name any
key of the queue, and each of the others has the commands for one kind of key.
"""

from collections import defaultdict
from enum import StrEnum

from ingine.contract.keys import GROUP, QUEUE_NAME, Keys, Priority


class Role(StrEnum):
    """A party that has a user of its own at the server."""

    WORKER = "worker"
    """Runs jobs. No other role writes tokens."""
    PRODUCER = "producer"
    """Does all that the client library does for its own jobs: submit, follow, list, cancel."""
    SUBMITTER = "submitter"
    """Submits, and cannot read outputs."""
    CONSUMER = "consumer"
    """Follows jobs, and cannot write."""
    OPERATOR = "operator"
    """Controls the queue, and requeues or purges dead letters."""
    OBSERVER = "observer"
    """Sees the state of the queue and its jobs."""


KINDS = {
    "job": "job:*",
    "tokens": "tokens:*",
    "jobs": "jobs:*",
    "fair": "fair:*",
    "ends": "ends:*",
    "aside": "aside:*",
    "queue": "queue",
    "bytes": "bytes",
    "delayed": "delayed",
    "deadlines": "deadlines",
    "replies": "replies:*",
    "idem": "idem:*",
    "rate": "rate:*",
    "workers": "workers",
    "models": "models",
    "dead": "dead",
}
"""Kind of key -> end of its pattern. Servers search in this order, so kinds used for each token are first."""

CHANNELS = {"channel": "channel:*", "control": "control"}

CONNECTION = "PING CLIENT|SETNAME CLUSTER|SLOTS"
"""Commands of every connection."""

ALL_TAGS = "*"
"""Stands for all queues of the server, in place of a queue's name."""

_SUBMIT = {
    "": "EVALSHA SCRIPT|LOAD SCRIPT|EXISTS TIME",
    "job": "HGET HSET EXISTS PTTL",
    "jobs": "XADD XLEN",
    "queue": "HGET HMGET",
    "bytes": "GET INCRBY SET",
    "delayed": "ZADD ZCARD",
    "deadlines": "ZADD",
    "idem": "GET SET PTTL PEXPIRE",
    "rate": "GET SET",
    "workers": "HGETALL",
}
_CONSUME = {
    "": "TIME SUNSUBSCRIBE",
    "job": "HMGET HGETALL",
    "tokens": "XRANGE XREAD",
    "queue": "HGET",
    "replies": "XREAD",
    "workers": "HGETALL",
    "channel": "SSUBSCRIBE",
}
_OBSERVE = {
    "": "TIME MULTI EXEC",
    "job": "HGETALL",
    "jobs": "XLEN XPENDING",
    "queue": "HGET HGETALL",
    "bytes": "GET",
    "delayed": "ZCARD",
    "workers": "HGETALL",
    "dead": "XLEN",
}
_CANCEL_AND_LIST = {
    "job": "HGET HMGET HSET HDEL PEXPIRE",
    "tokens": "XADD PEXPIRE",
    "jobs": "XRANGE XPENDING XACK XDEL",
    "bytes": "DECRBY DEL",
    "delayed": "ZRANGE ZADD ZREM",
    "deadlines": "ZADD ZRANGE ZREM",
    "replies": "XADD XRANGE XDEL PTTL PEXPIRE",
    "idem": "PEXPIRE",
    "channel": "SPUBLISH",
    "control": "SPUBLISH",
}
_OPERATE = {
    "": "EVALSHA SCRIPT|LOAD",
    "job": "HGET HMGET",
    "jobs": "XRANGE XADD",
    "queue": "HSET HDEL DEL",
    "delayed": "ZRANGE",
    "dead": "XRANGE XDEL DEL",
    "control": "SPUBLISH",
}
_WORK = {
    "": "EVALSHA SCRIPT|LOAD TIME",
    "job": "HGET HMGET HSET HDEL HINCRBY PEXPIRE",
    "tokens": "XADD XRANGE PEXPIRE",
    "jobs": "XREADGROUP XADD XRANGE XLEN XACK XDEL XCLAIM XPENDING XGROUP|CREATE XGROUP|DELCONSUMER "
    "XINFO|CONSUMERS XINFO|GROUPS XINFO|STREAM DEL",
    "fair": "ZADD ZPOPMIN ZCARD ZRANGE ZSCORE EXISTS DEL",
    "ends": "ZADD ZCARD ZSCORE ZREMRANGEBYSCORE DEL",
    "aside": "XADD XRANGE XLEN XDEL DEL",
    "queue": "HGET HGETALL HSET HSETNX HDEL",
    "bytes": "DECRBY DEL",
    "delayed": "ZADD ZCARD ZRANGE ZREM ZSCORE",
    "deadlines": "ZADD ZRANGE ZREM",
    "replies": "XADD XRANGE XDEL PTTL PEXPIRE",
    "idem": "PEXPIRE",
    "workers": "HSET HDEL HGETALL EXPIRE",
    "models": "HSET HGETALL HDEL EXPIRE",
    "dead": "XADD XLEN",
    "channel": "SPUBLISH",
    "control": "SPUBLISH SSUBSCRIBE",
}
_READS = {"GET", "HGET", "HGETALL", "HMGET", "XLEN", "XPENDING", "XRANGE", "XREAD", "ZCARD", "ZRANGE"}


def _together(*parts: dict[str, str]) -> dict[str, list[str]]:
    commands: dict[str, dict[str, None]] = defaultdict(dict)
    for part in ({"": CONNECTION}, *parts):
        for kind, names in part.items():
            commands[kind] |= dict.fromkeys(names.split())
    return {kind: list(names) for kind, names in commands.items()}


RIGHTS = {
    Role.WORKER: _together(_WORK),
    Role.PRODUCER: _together(_SUBMIT, _CONSUME, _OBSERVE, _CANCEL_AND_LIST),
    Role.SUBMITTER: _together(_SUBMIT),
    Role.CONSUMER: _together(_CONSUME),
    Role.OPERATOR: _together(_OBSERVE, _OPERATE),
    Role.OBSERVER: _together(_OBSERVE),
}
"""Commands by kind of key or channel. Those under '' name no key, except EVALSHA, which names any."""


def user_line(role: Role, user: str, digest: str, tags: list[str]) -> str:
    """Return the line of an access list for a user with these rights, on the queues of these hash tags only.

    It begins with `reset`: if the user exists, ACL SETUSER removes its other rights first.

    digest: the password's SHA-256 in hex. tags: from `tags_of`.
    """
    rights = RIGHTS[role]
    bare = [name for name in rights[""] if name != "EVALSHA"]
    words = [f"user {user} reset on #{digest} resetchannels", *_plus(bare)]
    if "EVALSHA" in rights[""]:
        words.append(_selector(_patterns("~", tags, "*"), ["EVALSHA"]))
    for kind, end in KINDS.items():
        if names := rights.get(kind):
            sign = "%R~" if _READS.issuperset(names) else "~"
            words.append(_selector(_patterns(sign, tags, end), names))
    for kind, end in CHANNELS.items():
        if names := rights.get(kind):
            words.append(_selector(["resetchannels", *_patterns("&", tags, end)], names))
    return " ".join(words)


def _selector(patterns: list[str], names: list[str]) -> str:
    return f"({' '.join([*patterns, *_plus(names)])})"


def _plus(names: list[str]) -> list[str]:
    return [f"+{name.lower()}" for name in names]


def _patterns(sign: str, tags: list[str], end: str) -> list[str]:
    return [f"{sign}ingine:{{{tag}}}:{end}" for tag in tags]


def tags_of(queue: str, *, partitioned: bool = False) -> list[str]:
    """Return patterns for the hash tags of a queue's keys; for `*` the pattern of all queues.

    partitioned: include the tags of any number of partitions. Raises ValueError if it is no queue's name.
    """
    if queue == ALL_TAGS:
        return [ALL_TAGS]
    if not QUEUE_NAME.fullmatch(queue):
        raise ValueError(f"a queue's name matches {QUEUE_NAME.pattern}, {queue!r} does not")
    return [queue, f"{queue}.[0-9]", f"{queue}.[1-6][0-9]"] if partitioned else [queue]


def calls(role: Role, keys: Keys) -> list[str]:
    """Return each command of a role with a key of each kind that it is for, to ask whether it is allowed.

    They are not made to be run: arguments that do not matter to the answer are left out.
    """
    on = {kind: f"{keys.prefix}:{end.replace('*', '0')}" for kind, end in (KINDS | CHANNELS).items()}
    on["jobs"] = keys.jobs(Priority.NORMAL)
    needed = []
    for kind, names in RIGHTS[role].items():
        for name in names:
            match name:
                case "EVALSHA":
                    touched = [on[kind] for kind in KINDS if kind in RIGHTS[role]]
                    needed.append(f"EVALSHA {'0' * 40} {len(touched)} {' '.join(touched)}")
                case "SCRIPT|LOAD":
                    needed.append("SCRIPT LOAD x")
                case "XREADGROUP":
                    needed.append(f"XREADGROUP GROUP {GROUP} 0 STREAMS {on[kind]} >")
                case _ if kind:
                    needed.append(f"{name.replace('|', ' ')} {on[kind]}")
                case _ if name not in CONNECTION.split()[1:]:
                    needed.append(name.replace("|", " "))
    return needed
