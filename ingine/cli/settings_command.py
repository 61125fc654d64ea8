"""A command whose options are the settings of a program."""

import inspect
from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property

import typer
import typer.core
import typer.main


class SettingsCommand(typer.core.TyperCommand):
    """Makes its options when they are needed: they come from the settings, which load pydantic."""

    @staticmethod
    @abstractmethod
    def make() -> Callable[..., None]:
        """Return the function with its options, see `settings_flags.with_flags`."""

    @classmethod
    def register(cls, app: typer.Typer, function: Callable[..., None]) -> None:
        """Add the command under the function's name. `make` returns what is called, not this function."""
        app.command(function.__name__, cls=cls, help=inspect.getdoc(function))(lambda: None)

    @cached_property
    def _with_flags(self) -> typer.core.TyperCommand:
        app = typer.Typer(add_completion=False)
        app.command()(self.make())
        return typer.main.get_command(app)

    def get_params(self, context: typer.Context) -> list:
        return self._with_flags.get_params(context)

    def invoke(self, context: typer.Context) -> None:
        self._with_flags.invoke(context)
