"""The gateway's settings. Each is an `INGINE_` variable, a line in `.env`, or a flag of `ingine gateway`."""

import ipaddress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError, field_validator
from pydantic_settings import SettingsError

from ingine.byte_sizes import parse_bytes
from ingine.connect.environment import ENV_PREFIX, check_variables, is_service_link
from ingine.connect.secrets import secrets_dir, unreadable
from ingine.errors import ConfigError
from ingine.producer.settings import ProducerSettings

Bytes = Annotated[int, BeforeValidator(parse_bytes)]
FIELD_PREFIX = "gateway_"
"""Flags lack it: `gateway_port` is --port."""


class GatewaySettings(ProducerSettings):
    gateway_host: str = Field("127.0.0.1", description="0.0.0.0: reachable from other machines.")
    gateway_port: int = Field(8000, ge=0, le=65535, description="0: any free one.")

    @field_validator("gateway_port", mode="before")
    @classmethod
    def _no_service_link(cls, value: Any) -> Any:
        """Ignore the INGINE_GATEWAY_PORT that Kubernetes sets, to a URL, for a Service `ingine-gateway`."""
        is_link = isinstance(value, str) and is_service_link("INGINE_GATEWAY_PORT", value)
        return cls.model_fields["gateway_port"].default if is_link else value

    gateway_keys: Path | None = Field(
        None, description="File of API keys, see `ingine keys`. Unset: no keys, on loopback only."
    )
    gateway_without_keys: bool = Field(False, description="Serve other machines without API keys.")
    gateway_max_body_bytes: Bytes = Field(8 << 20, ge=1, description="Limit of a request's body.")
    gateway_body_timeout_s: float = Field(30.0, gt=0, description="How long a body may take to arrive.")
    gateway_timeout_s: float = Field(
        600.0, gt=0, description="From submission to the end of a job that a client waits for."
    )
    gateway_send_timeout_s: float = Field(
        60.0, gt=0, description="A client that reads nothing for this long is disconnected."
    )
    gateway_ping_s: float = Field(15.0, gt=0, description="Silence after which a stream gets a comment.")
    gateway_max_requests: int = Field(
        10_000, ge=1, description="Requests at a time. Further ones get status 503."
    )

    @property
    def is_on_loopback(self) -> bool:
        try:
            return ipaddress.ip_address(self.gateway_host).is_loopback
        except ValueError:
            return self.gateway_host == "localhost"


def read_settings(**flags: object) -> GatewaySettings:
    """Settings from `flags`, then the environment, then `.env`, then the files in INGINE_SECRETS_DIR.

    Raises ConfigError, which names each invalid variable with its valid values, and each misspelled one.
    """
    check_variables()
    try:
        return GatewaySettings(_secrets_dir=secrets_dir(), **flags)
    except SettingsError as error:
        raise ConfigError(unreadable(error)) from None
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault) for fault in error.errors(include_url=False))) from None


def load_settings(**flags: object) -> GatewaySettings:
    """`read_settings` of a gateway that is to serve. Raises ConfigError also if other machines could reach it
    without keys.
    """
    settings = read_settings(**flags)
    if not (settings.gateway_keys or settings.gateway_without_keys or settings.is_on_loopback):
        raise ConfigError(
            f"INGINE_GATEWAY_HOST (--host): {settings.gateway_host} may be reachable from other machines, "
            "and there are no API keys: set INGINE_GATEWAY_KEYS to a file of keys (`ingine keys create`), or "
            "INGINE_GATEWAY_WITHOUT_KEYS=true if everyone may use this queue"
        )
    return settings


def flag_of(field: str) -> str:
    return f"--{field.removeprefix(FIELD_PREFIX).replace('_', '-')}"


def _explain(fault: dict) -> str:
    """Explain a fault in one sentence, without the value: any variable may hold a URL with its password."""
    name = str(fault["loc"][0])
    message = fault["msg"].removeprefix("Value error, ")
    field = GatewaySettings.model_fields[name]
    return f"{ENV_PREFIX}{name.upper()} ({flag_of(name)}): {message}. {field.description}"
