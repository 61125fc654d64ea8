"""The `ingine` command: composition only. All imports here are light; a command imports torch as it runs."""

import sys
from typing import Annotated

import typer

import producer.cli
import worker.cli
from ingine import __version__
from ingine.commands.bench import bench
from ingine.commands.demo import demo
from ingine.commands.generate import generate
from ingine.commands.pull import pull
from ingine.errors import ConfigError, IngineError, InvalidRequest, ServerUnavailable

# fmt: off
WORKER_EXTRA = {
    "torch", "transformers", "tokenizers", "safetensors", "huggingface_hub",
    "gguf", "numpy", "jinja2", "filelock", "prometheus_client",
}
# fmt: on

app = typer.Typer(
    name="ingine",
    help="LLM jobs in through Redis, every token out exactly once. Try `ingine demo` first.",
    epilog="Exit status: 0 done, 1 failed, 2 wrong usage or setting, 3 server unavailable, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
worker.cli.register(app)
app.command()(generate)
producer.cli.register(app)
app.command()(pull)
app.command()(bench)
app.command()(demo)


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
    """Errors that are raised on purpose end in one line, not in a traceback.

    Exit status: 0 done, 1 failed, 2 wrong usage or setting, 3 server unavailable, 130 interrupted.
    """
    try:
        app()
    except IngineError as error:
        typer.echo(f"ingine: {error}", err=True)
        sys.exit(_exit_code(error))
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in WORKER_EXTRA:
            raise
        typer.echo(f"ingine: this command needs {error.name}: pip install 'ingine[worker]'", err=True)
        sys.exit(2)


def _exit_code(error: IngineError) -> int:
    if isinstance(error, ServerUnavailable):
        return 3
    return 2 if isinstance(error, (ConfigError, InvalidRequest)) else 1


if __name__ == "__main__":
    main()
