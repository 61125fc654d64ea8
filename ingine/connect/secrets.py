"""Settings that lie in files, as Docker and Kubernetes mount secrets: one named `ingine_redis_url`, say."""

import os

from ingine.errors import ConfigError
from ingine.paths import expanded


def secrets_dir() -> str | None:
    """`INGINE_SECRETS_DIR`, or None if unset. Raises ConfigError for what is no folder, or may not be read.

    pydantic-settings would only warn of one that is missing, and a worker would go on without its password.
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
    """What a SettingsError of pydantic-settings says, and which file it was."""
    return f"{error}: {error.__cause__}" if isinstance(error.__cause__, OSError) else str(error)
