"""How commands find the embedded server that this user's worker has started (`worker.embedded`)."""

import os
from contextlib import suppress
from pathlib import Path

from ingine.errors import ConfigError
from ingine.folders import user_folder
from ingine.private_files import read_private

DEFAULT_URL = "redis://127.0.0.1:6379/0"
URL_FILE = "url"
"""Its URL, with the password. Written once the server has its port, so nobody else ever gets the password.
Locked by whoever has started the server, which ends with him."""
LOG_FILE = "valkey.log"
"""Locked by the server, until it ends, however it does."""


def default_data_dir() -> Path:
    return user_folder("INGINE_DATA_DIR", "XDG_DATA_HOME", "~/.local/share")


def default_url() -> str:
    """Of the server for those who name none: this user's embedded one if it runs, else `DEFAULT_URL`."""
    with suppress(ConfigError):  # a user without a home has no such server
        return running_url(default_data_dir()) or DEFAULT_URL
    return DEFAULT_URL


def running_url(data_dir: Path) -> str | None:
    """The URL of the embedded server that runs in `data_dir`; None if none does, or it is another user's."""
    url = read_private(data_dir / URL_FILE) if os.name == "posix" else None
    is_running = url and _is_locked(data_dir / URL_FILE) and _is_locked(data_dir / LOG_FILE)
    return url.strip() if is_running else None


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
