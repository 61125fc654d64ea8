"""The command `ingine gateway`. Its flags are made from `ingine.gateway.settings`."""

import inspect
from functools import cached_property

import typer
import typer.core
import typer.main


class GatewayCommand(typer.core.TyperCommand):
    """Makes its options when they are needed: they come from the settings, which load pydantic."""

    @cached_property
    def _with_flags(self) -> typer.core.TyperCommand:
        from ingine.cli.settings_flags import with_flags
        from ingine.gateway.settings import FIELD_PREFIX, GatewaySettings

        app = typer.Typer(add_completion=False)
        app.command()(with_flags(gateway, GatewaySettings, without_prefix=FIELD_PREFIX))
        return typer.main.get_command(app)

    def get_params(self, context: typer.Context) -> list:
        return self._with_flags.get_params(context)

    def invoke(self, context: typer.Context) -> None:
        self._with_flags.invoke(context)


def register(app: typer.Typer) -> None:
    # The function is not called: `GatewayCommand` has its own.
    app.command("gateway", cls=GatewayCommand, help=inspect.getdoc(gateway))(lambda: None)


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
