"""The `ingine` command: composition only. Modules imported here stay light; a command imports torch as it runs."""

import sys
from typing import Annotated

import typer

from importlib import import_module

from ingine import __version__
from ingine.errors import ConfigError, IngineError, InvalidRequest, ServerUnavailable

WORKER_EXTRA = {"torch", "transformers", "tokenizers", "safetensors", "gguf", "numpy", "jinja2", "prometheus_client"}

app = typer.Typer(
    name="ingine",
    help="LLM jobs in through Redis, every token out exactly once. Try `ingine demo` first.",
    epilog="Every setting has a flag and an INGINE_ variable; `ingine COMMAND --help` says more.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for _module, _add in (
    ("worker.cli", lambda m: m.register(app)),
    ("ingine.commands.generate", lambda m: app.command()(m.generate)),
    ("producer.cli", lambda m: m.register(app)),
    ("ingine.commands.pull", lambda m: app.command()(m.pull)),
    ("ingine.commands.bench", lambda m: app.command()(m.bench)),
    ("ingine.commands.demo", lambda m: app.command()(m.demo)),
):
    try:
        _add(import_module(_module))
    except ImportError:
        pass


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ingine {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Errors that we raise on purpose end in one line, not in a traceback. Exit codes as in `ingine --help`."""
    try:
        app()
    except IngineError as error:
        typer.echo(f"ingine: {error}", err=True)
        sys.exit(_exit_code(error))
    except ModuleNotFoundError as error:
        if error.name not in WORKER_EXTRA:
            raise
        typer.echo(f"ingine: this command needs {error.name}: pip install 'ingine[worker]'", err=True)
        sys.exit(2)


def _exit_code(error: IngineError) -> int:
    if isinstance(error, ServerUnavailable):
        return 3
    return 2 if isinstance(error, (ConfigError, InvalidRequest)) else 1


if __name__ == "__main__":
    main()
