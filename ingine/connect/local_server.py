"""Which server those use who name none: the embedded one that this user's worker has started
(`ingine.worker.embedded`), else one on the default port, unless that is another person's.
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
"""User ids that distributions give to people. Those below are of services, those above of containers, of
services without a user of their own, and of nobody."""
URL_FILE = "url"
"""Its URL, with the password. Written once the server has its port, so nobody else ever gets the password.
Locked by whoever has started the server, which ends with him."""
HOST_FILE = "host"
"""Where its address holds, as `this_host` has it: a home may lie on a file server, or be shared by
containers, and 127.0.0.1 is another server there."""
LOG_FILE = "valkey.log"
"""Locked by the server, until it ends, however it does."""


def default_data_dir() -> Path:
    return user_folder("INGINE_DATA_DIR", "XDG_DATA_HOME", "~/.local/share")


class DefaultServer:
    """The server of those who name none, as one client has found it so far."""

    def __init__(self):
        self._was_embedded = False
        self.last_url = DEFAULT_URL
        """What `find` has answered last."""

    def find(self) -> str:
        """Its URL by now. An embedded one may start, or start anew elsewhere, long after the client was made.

        Raises ConfigError while the embedded one is away that was found before: its jobs are not on another.
        So it does if another person has the default port: whoever sends a prompt there means it.
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
    """The name of another person than this user who gets what is sent to `port` of DEFAULT_HOST. None also
    where the kernel does not tell. Raises ConfigError where it could not be asked."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            lines = Path(table).read_text().splitlines()[1:]
        except (FileNotFoundError, PermissionError):
            continue
        except OSError as error:
            raise ConfigError(
                f"whose the server on {DEFAULT_HOST}:{port} is cannot be told ({table}: {error.strerror}): "
                "try again, or set INGINE_REDIS_URL"
            ) from None
        for line in lines:
            _, address, _, state, _, _, _, uid, *_ = line.split()
            listens = state == "0A" and _takes(address, port)
            if listens and int(uid) in PERSONS and int(uid) != os.geteuid():
                return user_name(int(uid))
    return None


def _takes(listening: str, port: int) -> bool:
    """Whether a socket at this address of a table gets what is sent to `port` of DEFAULT_HOST."""
    words, _, listening_port = listening.rpartition(":")
    if int(listening_port, 16) != port:
        return False
    # Each word of 32 bits is printed as a number of this machine.
    words = [int(word, 16).to_bytes(4, sys.byteorder) for word in re.findall("[0-9A-F]{8}", words)]
    address = ip_address(b"".join(words))
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_unspecified or address == ip_address(DEFAULT_HOST)


def running_url(data_dir: Path) -> str | None:
    """The URL of the embedded server that runs in `data_dir`; None if none does, or it is another user's."""
    url = read_private(data_dir / URL_FILE) if os.name == "posix" else None
    return url.strip() if url and why_not_running(data_dir) is None else None


def why_not_running(data_dir: Path) -> str | None:
    """Why there is no embedded server to use in `data_dir`, for a message. None: there is one.

    Raises nothing: what it says is a part of other errors."""
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
        return "that one has ended"
    return None


def no_embedded_server(data_dir: Path) -> str:
    """Where one was looked for in vain, as part of a message."""
    return (
        f"this user's embedded server was looked for in {data_dir}: {why_not_running(data_dir)}; "
        "INGINE_DATA_DIR or XDG_DATA_HOME name another folder"
    )


def this_host() -> str:
    """Names the network that 127.0.0.1 is of, for `_is_this_host`: a JSON map of what this process can tell.
    On Linux the kernel's start and the network namespace, unless a sandbox hides them; the machine's name."""
    found = {"name": socket.gethostname()}
    with suppress(OSError):
        found["boot_id"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    with suppress(OSError):
        found["network"] = os.readlink("/proc/self/ns/net")
    return json.dumps(found)


def _is_this_host(written: str | None) -> bool:
    """Compares what both can tell. The machine's name may change, and counts only where it takes it: the
    first namespace has the same number on every machine, and all containers of a machine have its boot id."""
    try:
        theirs, ours = json.loads(written or ""), json.loads(this_host())
        both = (theirs.keys() & ours.keys()) - {"name"}
    except (ValueError, AttributeError):
        return False
    compared = both if len(both) == 2 else both | {"name"}
    return all(theirs.get(name) == ours[name] for name in compared)


def is_changing(data_dir: Path) -> bool:
    """A server has `data_dir` that cannot be used yet, or no more."""
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
