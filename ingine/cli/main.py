"""The `ingine` command. Imports here are light: a command imports torch only when it runs."""

import inspect
import io
import logging
import os
import sys
import traceback
from types import TracebackType
from typing import Annotated

import typer
from typer.core import TyperGroup

import ingine.cli.gateway
import ingine.cli.options
import ingine.cli.producer
import ingine.cli.worker
from ingine import __version__
from ingine.cli.acl import acl
from ingine.cli.bench import bench
from ingine.cli.demo import demo
from ingine.cli.generate import generate
from ingine.cli.keys import keys_app
from ingine.cli.pull import pull
from ingine.cli.top import top
from ingine.errors import ConfigError, IngineError, InvalidRequest, ServerUnavailable
from ingine.extras import missing_extra
from ingine.terminal import EchoHandler, echo


class _Commands(TyperGroup):
    def invoke(self, ctx: typer.Context) -> object:
        """Exit with status 130 on Ctrl-C; earlier versions of Typer exit with 1."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise typer.Exit(ingine.cli.options.INTERRUPTED) from None


app = typer.Typer(
    name="ingine",
    cls=_Commands,
    help="LLM jobs in through Redis, every token out exactly once. Try `ingine demo` first.",
    epilog="Exit status: 0 done, 1 failed, 2 wrong usage or setting, 3 server unavailable, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # its boxes take longer to import than all the rest of `ingine --help`
)
ingine.cli.worker.register(app)
app.command()(generate)
ingine.cli.producer.register(app)
ingine.cli.gateway.register(app)
app.add_typer(keys_app, name="keys")
app.command()(top)
app.command()(pull)
app.command()(acl)
app.command()(bench)
app.command()(demo)


def _join_lines(group: typer.Typer) -> None:
    """Join the lines of each paragraph of the help texts: Typer only does so in the first."""
    for command in group.registered_commands:
        text = command.help or inspect.getdoc(command.callback)
        command.help = "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
    for subgroup in group.registered_groups:
        _join_lines(subgroup.typer_instance)


_join_lines(app)


def _print_version(wanted: bool) -> None:
    if wanted:
        echo(f"ingine {__version__}")
        raise typer.Exit()


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if context.invoked_subcommand == "worker" or "--help" in sys.argv:
        return  # a worker checks the variables itself, and logs them
    from ingine.connect.environment import check_variables

    for name in check_variables():
        echo(f"ingine: warning: {name} is not a setting, and is ignored", err=True)


def main() -> None:
    """Run the command. Our own errors and those of files are printed as one line, without a traceback.

    Exit status: 0 done, 1 failed, 2 wrong usage or setting, 3 server unavailable, 130 interrupted.
    """
    _prepare_streams()
    sys.excepthook = _show_traceback
    logging.basicConfig(handlers=[EchoHandler()], format="%(message)s")  # a worker has others
    try:
        app()
    except IngineError as error:
        echo(f"ingine: {error}", err=True, keep_lines=True)
        sys.exit(_exit_code(error))
    except OSError as error:
        _forget_output()
        where = f"{os.fsdecode(error.filename)}: " if error.filename else ""
        echo(f"ingine: {where}{error.strerror or error}", err=True)
        sys.exit(1)
    except ModuleNotFoundError as error:
        said = missing_extra(error, "this command")
        if said is None:
            raise
        echo(f"ingine: {said}", err=True)
        sys.exit(2)


def _prepare_streams() -> None:
    """Make the standard streams usable: a program may be started without them, as in `ingine ... >&-`.

    Invalid UTF-8 in the input is replaced, and so is output that the terminal cannot show.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
    if isinstance(sys.stdin, io.TextIOWrapper):  # a caller may have replaced it
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _show_traceback(kind: type[BaseException], error: BaseException, frames: TracebackType | None) -> None:
    echo("".join(traceback.format_exception(kind, error, frames)), err=True, end="", keep_lines=True)


def _forget_output() -> None:
    """Discard unwritten output, or the interpreter would try to write it at exit and fail again."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _exit_code(error: IngineError) -> int:
    if isinstance(error, ServerUnavailable):
        return 3
    return 2 if isinstance(error, (ConfigError, InvalidRequest)) else 1


if __name__ == "__main__":
    main()
