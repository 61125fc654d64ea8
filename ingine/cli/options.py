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
Sampling = Annotated[
    str | None,
    typer.Option(
        "--sampling",
        metavar="JSON",
        help='More sampling parameters, as in {"bad_words": ["um"]}. See docs/reference/request-fields.md.',
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")]

INTERRUPTED = 130
"""Exit status after Ctrl-C: 128 + SIGINT, as in shells."""


def sampling_fields(text: str | None, **options: Any) -> dict[str, Any]:
    """Return the sampling parameters of `--sampling`, and over them the options that were given."""
    try:
        fields = json.loads(text or "{}")
    except ValueError as error:
        raise typer.BadParameter(f"not JSON: {error}", param_hint="--sampling") from None
    if not isinstance(fields, dict):
        raise typer.BadParameter('must be an object, as in {"top_p": 0.9}', param_hint="--sampling")
    if isinstance(bias := fields.get("logit_bias"), dict):  # JSON has no keys that are numbers
        fields["logit_bias"] = {int(i) if i.isdecimal() else i: value for i, value in bias.items()}
    return fields | {name: value for name, value in options.items() if value is not None}


def print_json(fields: Any) -> None:
    """Print one line of JSON, flushed so that a pipe gets it at once.

    Values that JSON does not have, which any client may have written into a log, are printed as text.
    """
    try:
        text = json.dumps(fields, default=_printable)
    except TypeError:  # a key
        text = json.dumps(_with_text_as_keys(fields), default=_printable)
    echo(text)


def print_fields(fields: dict[str, Any], as_json: bool) -> None:
    """Print one field per line, without the unset ones; or all as JSON."""
    if as_json:
        return print_json(fields)
    for name, value in fields.items():
        if value is not None:
            echo(f"{name + ':':<18} {_printable(value) if isinstance(value, bytes) else value}")


def _printable(value: Any) -> str:
    return value.decode(errors="backslashreplace") if isinstance(value, bytes) else str(value)


def _with_text_as_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key if isinstance(key, str | int) else _printable(key): _with_text_as_keys(each)
            for key, each in value.items()
        }
    return [_with_text_as_keys(each) for each in value] if isinstance(value, list | tuple) else value
