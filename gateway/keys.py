"""API keys: a file of their digests, and what each key may do.

A key has 256 random bits, so its SHA-256 cannot be reversed, and no slow hash is needed. A key is looked up
by its digest: the time that takes says nothing about the digests that are stored.
"""

import base64
import fcntl
import hashlib
import json
import logging
import os
import secrets
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ingine.contract.jobs import Name
from ingine.errors import ConfigError
from ingine.private_files import write_private

logger = logging.getLogger("gateway")

PREFIX = "sk-ingine-"
KEY_BYTES = 32


class ApiKey(BaseModel):
    """What the file holds of one key."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: Name
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    tenant: Name | None = None
    models: frozenset[str] | None = None
    """The names of models that it may ask for. None: all."""
    created_at: int = 0
    """Unix time in seconds."""

    def allows(self, model: str) -> bool:
        return self.models is None or model in self.models


_KEYS = TypeAdapter(list[ApiKey])


def digest_of(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


class KeyFile:
    """The keys in a file, read again whenever it has changed."""

    def __init__(self, path: Path):
        """Raises ConfigError if the file cannot be read."""
        self._path = path
        self._version: object = None
        self._keys: dict[str, ApiKey] = {}
        self._load()

    def find(self, key: str) -> ApiKey | None:
        """Return the entry of a key, None if there is none.

        A file that can no longer be read is logged, and counts as unchanged.
        """
        try:
            self._load()
        except ConfigError as error:
            logger.error("%s; the keys that were read before stay valid", error)
        return self._keys.get(digest_of(key))

    def _load(self) -> None:
        try:
            found = self._path.stat()
        except OSError as error:
            raise ConfigError(_unreadable(self._path, error.strerror)) from None
        version = (found.st_ino, found.st_mtime_ns, found.st_size)
        if version != self._version:
            self._version = version
            self._keys = {key.sha256: key for key in read_keys(self._path)}


def read_keys(path: Path) -> list[ApiKey]:
    """Return the keys in a file. Raises ConfigError if it cannot be read."""
    try:
        return _KEYS.validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigError(_unreadable(path, error.strerror)) from None
    except ValidationError:
        raise ConfigError(_unreadable(path, "it is not a list of keys as `ingine keys` writes it")) from None


def create_key(path: Path, *, tenant: str | None, models: Sequence[str] | None) -> tuple[ApiKey, str]:
    """Add a new key to a file, which is made if it is missing. Returns its entry, and the key itself.

    The key is stored nowhere. Raises ConfigError.
    """
    key = PREFIX + base64.urlsafe_b64encode(secrets.token_bytes(KEY_BYTES)).rstrip(b"=").decode()
    try:
        entry = ApiKey(
            id=f"key_{secrets.token_hex(6)}",
            sha256=digest_of(key),
            tenant=tenant,
            models=frozenset(models) if models else None,
            created_at=int(time.time()),
        )
    except ValidationError:
        raise ConfigError("a tenant's name has 1 to 128 of A-Z a-z 0-9 _ . : -") from None
    with _locked(path):
        _write(path, [*(read_keys(path) if path.exists() else ()), entry])
    return entry, key


def revoke_key(path: Path, key_id: str) -> None:
    """Remove a key from a file. Gateways refuse it from the next request on. Raises ConfigError."""
    with _locked(path):
        keys = read_keys(path)
        kept = [key for key in keys if key.id != key_id]
        if len(kept) == len(keys):
            raise ConfigError(f"{path} has no key {key_id!r}")
        _write(path, kept)


def fields_of(key: ApiKey) -> dict[str, Any]:
    """What `ingine keys list` shows, and the file holds beside the digest."""
    models = None if key.models is None else sorted(key.models)
    return {"id": key.id, "tenant": key.tenant, "models": models, "created_at": key.created_at}


def _write(path: Path, keys: list[ApiKey]) -> None:
    entries = [fields_of(key) | {"sha256": key.sha256} for key in keys]
    write_private(path, json.dumps(entries, indent=1) + "\n")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Let one command at a time change the file. The lock is on its folder, since the file is replaced."""
    try:
        with _open_folder(path.parent) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise ConfigError(f"INGINE_GATEWAY_KEYS: {path} cannot be written: {error.strerror}") from None


@contextmanager
def _open_folder(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def _unreadable(path: Path, reason: str | None) -> str:
    return f"INGINE_GATEWAY_KEYS (--keys): {path} cannot be read: {reason}"
