"""A producer's settings: the server and the queue, from `INGINE_` variables or lines in `.env`."""

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from ingine.connect.environment import ENV_FILE, ENV_PREFIX, check_variables
from ingine.connect.secrets import secrets_dir, unreadable
from ingine.connect.url import check_url
from ingine.contract.keys import Keys
from ingine.errors import ConfigError


class ProducerSettings(BaseSettings):
    # `.env` may also hold a worker's variables, so unknown ones are no error here.
    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_file=ENV_FILE, extra="ignore", frozen=True)

    redis_url: str | None = Field(
        None,
        repr=False,
        description="One server (redis://, rediss://, unix://), redis+sentinel:// or redis+cluster://.",
    )
    queue: str = Field("default", description="Letters, digits and `_.-`, at most 64.")

    @field_validator("redis_url")
    @classmethod
    def _usable(cls, value: str | None) -> str | None:
        return None if value is None else check_url(value)

    @field_validator("queue")
    @classmethod
    def _queue_name(cls, value: str) -> str:
        return Keys(value).queue


def load_settings(**overrides: str | None) -> ProducerSettings:
    """Load settings from arguments, else variables, `.env`, secret files.

    Raises ConfigError, which names the variable.
    """
    check_variables()
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return ProducerSettings(_secrets_dir=secrets_dir(), **given)
    except SettingsError as error:
        raise ConfigError(unreadable(error)) from None
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault) for fault in error.errors(include_url=False))) from None


def _explain(fault: dict) -> str:
    """Explain a fault in one sentence, without the value: any variable may hold a URL with its password."""
    name = str(fault["loc"][0])
    message = fault["msg"].removeprefix("Value error, ")
    field = ProducerSettings.model_fields[name]
    return f"{ENV_PREFIX}{name.upper()} (--{name.replace('_', '-')}): {message}. {field.description}"
