"""How a worker connects to Redis: a connection for each kind of use, so that none can hold up another."""

import re

import redis
import redis.asyncio
from redis.backoff import NoBackoff

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 5.0

_OPTIONS = {
    "protocol": 2,
    "socket_connect_timeout": CONNECT_TIMEOUT_S,
    "socket_timeout": ANSWER_TIMEOUT_S,
    "socket_keepalive": True,
    "client_name": "ingine-worker",
}


def connect(url: str) -> redis.asyncio.Redis:
    """An asyncio client that never sends a command twice by itself: the caller knows what may be repeated."""
    retry = redis.asyncio.retry.Retry(NoBackoff(), 0)
    return redis.asyncio.from_url(url, retry=retry, **_OPTIONS)


def connect_sync(url: str) -> redis.Redis:
    return redis.from_url(url, retry=redis.retry.Retry(NoBackoff(), 0), **_OPTIONS)


def redact(url: str) -> str:
    """`url` without its password, for logs. Its options may hold one too."""
    return re.sub(r"//([^:@/]*):[^@]*@", r"//\1:***@", url.partition("?")[0])
