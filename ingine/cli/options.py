"""Options and output that all producer commands share."""

import json
from typing import Annotated, Any

import typer

from ingine.terminal import echo

RedisUrl = Annotated[
    str | None,
    typer.Option(help="Where Redis is.", show_default="$INGINE_REDIS_URL, else the server of this machine"),
]
QueueName = Annotated[
    str | None, typer.Option("--queue", help="Which queue.", show_default="$INGINE_QUEUE or default")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]


def print_json(fields: Any) -> None:
    """One line; flushed, so that a pipe sees it now."""
    echo(json.dumps(fields, default=_printable))


def print_fields(fields: dict[str, Any], as_json: bool) -> None:
    """One a line for people, those that are not set left out."""
    if as_json:
        return print_json(fields)
    for name, value in fields.items():
        if value is not None:
            echo(f"{name + ':':<18} {_printable(value) if isinstance(value, bytes) else value}")


def _printable(value: bytes) -> str:
    return value.decode(errors="backslashreplace")
