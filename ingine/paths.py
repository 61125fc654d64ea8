"""Locates the user's files. A container's user may have no home directory."""

import os
from pathlib import Path

from ingine.errors import ConfigError


def expanded(path: str, setting: str) -> Path:
    """Replace ~ in `path`. Raises ConfigError, which names `setting`, if the user has no home directory."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise ConfigError(
            f"{path} cannot be found: this user has no home directory. Set {setting} to a folder"
        ) from None


def user_folder(setting: str, xdg: str, default: str) -> Path:
    """The folder in the environment variable `setting`. If that is unset or empty: `ingine` in the folder of
    the variable `xdg`, or else in `default`.
    """
    if chosen := os.environ.get(setting):
        return expanded(chosen, setting)
    return expanded(os.environ.get(xdg) or default, setting) / "ingine"


def cache_root() -> Path:
    """$INGINE_CACHE_DIR, or `ingine` in the user's cache directory."""
    return user_folder("INGINE_CACHE_DIR", "XDG_CACHE_HOME", "~/.cache")
