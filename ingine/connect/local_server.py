"""The default server, for clients and workers without a URL: the embedded server that this user's worker has
started (`ingine.worker.embedded`), else the server on the default port, unless another person runs it.
"""

import json
import os
import re
import socket
import sys
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path

from ingine.errors import ConfigError
from ingine.paths import user_folder
from ingine.private_files import read_private, user_name

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 6379
DEFAULT_URL = f"redis://{DEFAULT_HOST}:{DEFAULT_PORT}/0"
PERSONS = range(1000, 60_000)
"""User ids that distributions give to people. Lower ones are of services; higher ones are of containers, of
services without a user of their own, and of the user `nobody`."""
URL_FILE = "url"
"""The file with its URL and password. It is written once the server has its port, so the password is never
sent to another process. The process that started the server locks it; the server ends with that process."""
HOST_FILE = "host"
"""The file that says on which host the address is valid, as `this_host` returns it. A home may lie on a file
server or be shared by containers, and 127.0.0.1 is another server there."""
LOG_FILE = "valkey.log"
"""The server's log file, which the server locks until it ends for whatever reason."""


def default_data_dir() -> Path:
    return user_folder("INGINE_DATA_DIR", "XDG_DATA_HOME", "~/.local/share")


class DefaultServer:
    """The default server, as one client has found it so far."""

    def __init__(self):
        self._was_embedded = False
        self.last_url = DEFAULT_URL
        """The last answer of `find`."""

    def find(self) -> str:
        """Return its current URL. An embedded server may start, or restart on another port, at any time.

        Raises ConfigError while an embedded server that was found before is away, since no other server has
        its jobs; and if another person runs the server on the default port, which must not get prompts by
        default.
        """
        self.last_url = self._running() or self._on_the_default_port()
        return self.last_url

    def _running(self) -> str | None:
        with suppress(ConfigError):  # a user without a home has no embedded server
            if url := running_url(default_data_dir()):
                self._was_embedded = True
                return url
        return None

    def _on_the_default_port(self) -> str:
        if self._was_embedded:
            raise ConfigError("the embedded server that was used until now is away")
        if person := other_person_on(DEFAULT_PORT):
            raise ConfigError(
                f"the server on {DEFAULT_HOST}:{DEFAULT_PORT} is another user's, {person}: set "
                f"INGINE_REDIS_URL, to {DEFAULT_URL} if you want that one"
            )
        return DEFAULT_URL


def other_person_on(port: int) -> str | None:
    """The name of the person, other than this user, who listens on `port` of DEFAULT_HOST.

    None if there is no such person, or the kernel does not say. Raises ConfigError if the kernel's table
    cannot be read.
    """
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except (FileNotFoundError, PermissionError):
            continue
        except OSError as error:
            raise ConfigError(
                f"cannot find out whose server is on {DEFAULT_HOST}:{port} ({table}: {error.strerror}): "
                "try again, or set INGINE_REDIS_URL"
            ) from None
        for line in lines:
            _, address, _, state, _, _, _, uid, *_ = line.split()
            listens = state == "0A" and _takes(address, port)
            if listens and int(uid) in PERSONS and int(uid) != os.geteuid():
                return user_name(int(uid))
    return None


def _takes(listening: str, port: int) -> bool:
    """True if a socket listening at this table address receives connections to `port` of DEFAULT_HOST."""
    words, _, listening_port = listening.rpartition(":")
    if int(listening_port, 16) != port:
        return False
    # Each 32-bit word is printed as a number in this machine's byte order.
    words = [int(word, 16).to_bytes(4, sys.byteorder) for word in re.findall("[0-9A-F]{8}", words)]
    address = ip_address(b"".join(words))
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_unspecified or address == ip_address(DEFAULT_HOST)


def running_url(data_dir: Path) -> str | None:
    """The URL of the embedded server that runs in `data_dir`. None without one, or with another user's."""
    url = read_private(data_dir / URL_FILE) if os.name == "posix" else None
    return url.strip() if url and why_not_running(data_dir) is None else None


def why_not_running(data_dir: Path) -> str | None:
    """The reason why no embedded server in `data_dir` can be used, for messages. None if one can.

    Never raises, since its answer is a part of other errors.
    """
    if os.name != "posix":
        return "none was started there"
    try:
        (data_dir / URL_FILE).lstat()
    except FileNotFoundError:
        return "none was started there"
    except OSError as error:  # another user's folder, which cannot be entered
        return f"it cannot be looked at, {error.strerror}"
    if read_private(data_dir / URL_FILE) is None:
        return f"{data_dir / URL_FILE} is not this user's alone"
    if not _is_this_host(read_private(data_dir / HOST_FILE)):
        return "that one was started on another machine, in another container or before a restart"
    if not (_is_locked(data_dir / URL_FILE) and _is_locked(data_dir / LOG_FILE)):
        return "it has ended, with its worker"
    return None


def no_embedded_server(data_dir: Path) -> str:
    """The part of a message that says where no embedded server was found, and why."""
    return (
        f"this user's embedded server was looked for in {data_dir}: {why_not_running(data_dir)}; "
        "INGINE_DATA_DIR or XDG_DATA_HOME name another folder"
    )


def this_host() -> str:
    """Identify the host that 127.0.0.1 refers to, for `_is_this_host`: a JSON map of what this process knows.

    It has the machine's name and, on Linux, the boot id and the network namespace, unless a sandbox hides
    them.
    """
    found = {"name": socket.gethostname()}
    with suppress(OSError):
        found["boot_id"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        found["network"] = os.readlink("/proc/self/ns/net")
    return json.dumps(found)


def _is_this_host(written: str | None) -> bool:
    """Compare the fields that both have.

    The machine's name may change, so it counts only if boot id or namespace is missing: the first namespace
    has the same number on every machine, and all containers of a machine have its boot id.
    """
    try:
        theirs, ours = json.loads(written or ""), json.loads(this_host())
        both = (theirs.keys() & ours.keys()) - {"name"}
    except (ValueError, AttributeError):
        return False
    compared = both if len(both) == 2 else both | {"name"}
    return all(theirs.get(name) == ours[name] for name in compared)


def is_changing(data_dir: Path) -> bool:
    """True if the server in `data_dir` is starting or stopping."""
    return _is_locked(data_dir / LOG_FILE) and not _is_locked(data_dir / URL_FILE)


def _is_locked(path: Path) -> bool:
    import fcntl  # not everywhere where producers run

    try:
        with path.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
