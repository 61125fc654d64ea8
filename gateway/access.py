"""Who makes a request: the API key, its tenant, and which jobs it may see."""

import hashlib
from dataclasses import dataclass

from starlette.requests import Request

from ingine.gateway.errors import Refused
from ingine.gateway.keys import ApiKey, KeyFile

OWNER_CHARS = 12


@dataclass(frozen=True, slots=True)
class Caller:
    key: ApiKey | None = None
    """None: the gateway has no keys."""

    @property
    def tenant(self) -> str | None:
        """The account of its jobs, for fair shares and rates."""
        return self.key.tenant if self.key else None

    @property
    def owner(self) -> str:
        """A mark in the ids of its jobs. Keys of one tenant have the same, so they see each other's jobs."""
        name = "" if self.key is None else f"tenant {self.key.tenant}" if self.key.tenant else self.key.id
        return hashlib.sha256(name.encode()).hexdigest()[:OWNER_CHARS]

    def require(self, model: str) -> None:
        """Raise Refused unless it may ask for this model."""
        if self.key is not None and not self.key.allows(model):
            raise Refused(
                403, "model_not_allowed", f"this API key may not use the model {model!r}", param="model"
            )


class Access:
    def __init__(self, key_file: KeyFile | None):
        """key_file: None serves everyone."""
        self._key_file = key_file

    def caller(self, request: Request) -> Caller:
        """Return who makes a request. Raises Refused without a valid key."""
        if self._key_file is None:
            return Caller()
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise _unauthorized("give your API key in a header: Authorization: Bearer KEY")
        if (found := self._key_file.find(key.strip())) is None:
            raise _unauthorized("this API key is not valid: it is wrong, or was revoked")
        return Caller(found)


def _unauthorized(message: str) -> Refused:
    return Refused(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})
