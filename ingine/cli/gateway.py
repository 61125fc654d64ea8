"""The command `ingine gateway`. Its flags are made from `ingine.gateway.settings`."""

from collections.abc import Callable

import typer

from ingine.cli.settings_command import SettingsCommand


class GatewayCommand(SettingsCommand):
    @staticmethod
    def make() -> Callable[..., None]:
        from ingine.cli.settings_flags import with_flags
        from ingine.gateway.settings import FIELD_PREFIX, GatewaySettings

        return with_flags(gateway, GatewaySettings, without_prefix=FIELD_PREFIX)


def register(app: typer.Typer) -> None:
    GatewayCommand.register(app, gateway)


def gateway(**flags: object) -> None:
    """Serve OpenAI's HTTP API over a queue.

    Each option is also a variable (--port is INGINE_GATEWAY_PORT, but --redis-url and --queue are
    INGINE_REDIS_URL and INGINE_QUEUE) or a line in `.env`. Options override variables, and variables override
    `.env`. Sizes in bytes may have a unit (2GB, 2GiB); durations are in seconds.

    Exit status: 0 stopped by a signal, 2 wrong setting.
    """
    from ingine.gateway.serve import serve
    from ingine.gateway.settings import load_settings

    serve(load_settings(**flags))
