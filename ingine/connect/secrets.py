"""Settings in files, as Docker and Kubernetes mount secrets: a file named `ingine_redis_url`, for example."""

import os

from ingine.errors import ConfigError
from ingine.paths import expanded


def secrets_dir() -> str | None:
    """`INGINE_SECRETS_DIR`, or None if unset. Raises ConfigError if it is not a readable folder.

    pydantic-settings would only warn of a missing folder, and a worker would start without its password.
    """
    named = os.environ.get("INGINE_SECRETS_DIR")
    if not named:
        return None
    folder = expanded(named, "INGINE_SECRETS_DIR")
    try:
        next(folder.iterdir(), None)
    except OSError as error:
        raise ConfigError(
            f"INGINE_SECRETS_DIR: {folder} must be a folder that can be read: {error.strerror}"
        ) from None
    return str(folder)


def unreadable(error: Exception) -> str:
    """The text of a SettingsError of pydantic-settings, with the file that it concerns."""
    return f"{error}: {error.__cause__}" if isinstance(error.__cause__, OSError) else str(error)
