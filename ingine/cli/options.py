"""Options and output of all producer commands."""

import json
from typing import Annotated, Any

import typer

from ingine.terminal import echo

RedisUrl = Annotated[
    str | None,
    typer.Option(help="The server.", show_default="$INGINE_REDIS_URL, else the server of this machine"),
]
QueueName = Annotated[
    str | None, typer.Option("--queue", help="The queue.", show_default="$INGINE_QUEUE or default")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def print_json(fields: Any) -> None:
    """Print one line of JSON, flushed so that a pipe gets it at once."""
    echo(json.dumps(fields, default=_printable))


def print_fields(fields: dict[str, Any], as_json: bool) -> None:
    """Print one field per line, without the unset ones; or all as JSON."""
    if as_json:
        return print_json(fields)
    for name, value in fields.items():
        if value is not None:
            echo(f"{name + ':':<18} {_printable(value) if isinstance(value, bytes) else value}")


def _printable(value: bytes) -> str:
    return value.decode(errors="backslashreplace")
