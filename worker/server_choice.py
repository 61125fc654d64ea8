"""Choose a worker's server: the configured one, the user's embedded one, the default one, or a new one."""

import logging
import time
from enum import StrEnum
from pathlib import Path

import redis

from ingine.connect.local_server import (
    DEFAULT_HOST,
    DEFAULT_PORT,
    DEFAULT_URL,
    default_data_dir,
    is_changing,
    no_embedded_server,
    other_person_on,
    running_url,
)
from ingine.connect.url import redact
from ingine.errors import ConfigError
from ingine.worker.embedded import START_TIMEOUT_S, DataDirInUse, EmbeddedServer, PortTaken, is_taken

log = logging.getLogger(__name__)


class _Listener(StrEnum):
    """What a probe of a port finds."""

    SERVER = "a server that answers"
    LOADING = "a server that loads its files"
    LOCKED = "a server that wants a password"
    NOBODY = "nobody"
    STRANGER = "something that is not a Redis server"
    OTHERS = "a server of another user"


def ensure_server(
    redis_url: str | None, *, data_dir: Path | None = None
) -> tuple[str, EmbeddedServer | None]:
    """The URL of the server to use, and the embedded server if one was started, which the caller must stop.

    With `redis_url`, that is the server, and none is started. Without, it is this user's embedded server if
    that runs, else the server that answers on the default URL, else a new embedded server: on the default
    port or, if another program has that, on a free one. Raises ConfigError.
    """
    if redis_url:
        return redis_url, None
    data_dir = data_dir or default_data_dir()
    deadline = time.monotonic() + START_TIMEOUT_S
    while not (url := running_url(data_dir)):
        found = _probe(DEFAULT_PORT)
        if found in (_Listener.SERVER, _Listener.LOADING):
            url = DEFAULT_URL
            break
        if found is _Listener.LOCKED and not is_changing(data_dir):
            raise ConfigError(
                f"{DEFAULT_URL} is {found}, and {no_embedded_server(data_dir)}. Set one of these, or "
                "INGINE_REDIS_URL, with the password in it"
            )
        try:
            if found is _Listener.NOBODY:
                return _start(EmbeddedServer(data_dir, port=DEFAULT_PORT))
            if found in (_Listener.STRANGER, _Listener.OTHERS):
                log.warning("port %d is taken by %s", DEFAULT_PORT, found)
                return _start(EmbeddedServer(data_dir))
        except (DataDirInUse, PortTaken):
            # Taken by a worker that starts at the same moment, or by the server of a worker that has just
            # been killed: the next round finds out.
            if time.monotonic() > deadline and not is_changing(data_dir):
                raise
        time.sleep(0.1)
    log.info("using the server that answers at %s", redact(url))
    return url, None


def _start(server: EmbeddedServer) -> tuple[str, EmbeddedServer]:
    server.start()
    log.info(
        "started an embedded server at %s, its files are in %s. This user's commands find it; others "
        "need INGINE_REDIS_URL, set to the content of %s",
        redact(server.url),
        server.data_dir,
        server.url_path,
    )
    return server.url, server


def _probe(port: int) -> _Listener:
    """Find out what listens on this machine's `port`, without a password."""
    if not is_taken(port):
        return _Listener.NOBODY
    if other_person_on(port):
        return _Listener.OTHERS
    client = redis.Redis(DEFAULT_HOST, port, socket_timeout=2, retry=None)
    try:
        client.ping()
        return _Listener.SERVER
    except redis.BusyLoadingError:
        return _Listener.LOADING
    except redis.AuthenticationError:
        return _Listener.LOCKED
    except redis.RedisError:
        return _Listener.STRANGER
    finally:
        client.close()
