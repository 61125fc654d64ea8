"""The flags of `ingine worker` and `ingine gateway`, made from their settings, so that none is missing."""

import inspect
from collections.abc import Callable
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic import BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from ingine.byte_sizes import parse_bytes

Bytes = Annotated[int, BeforeValidator(parse_bytes)]
"""The type of settings that are sizes."""
METAVARS = {str: "TEXT", int: "NUMBER", float: "NUMBER", Bytes: "BYTES"}


def with_flags(
    run: Callable[..., None], settings: type[BaseModel], *, without_prefix: str = ""
) -> Callable[..., None]:
    """Return `run` as a command whose options are the settings, named without that prefix.

    `run` gets the given options as text or bool: the settings class validates them, as it does variables.
    """

    def command(**flags: object) -> None:
        run(**{name: value for name, value in flags.items() if value is not None})

    command.__doc__ = run.__doc__
    command.__annotations__ = {
        name: _option(name.removeprefix(without_prefix), field)
        for name, field in settings.model_fields.items()
    }
    command.__signature__ = inspect.Signature(
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
        for name, option in command.__annotations__.items()
    )
    return command


def _option(name: str, field: FieldInfo) -> Any:
    flag, kind = f"--{name.replace('_', '-')}", _kind(field.annotation)
    if kind is bool:
        pair = f"{flag}/{flag.replace('--', '--no-', 1)}"
        return Annotated[bool | None, typer.Option(pair, help=_help(field), show_default=False)]
    metavar, choices = METAVARS.get(kind, "TEXT"), ""
    if get_origin(kind) is Literal:
        metavar = "NAME"
        choices = f"Choices: {', '.join(get_args(kind))}" if len(get_args(kind)) > 1 else ""
    described = _help(field, choices)
    return Annotated[str | None, typer.Option(flag, help=described, metavar=metavar, show_default=False)]


def _help(field: FieldInfo, also: str = "") -> str:
    """Join description, `also` and default, each as a sentence."""
    parts = [field.description.removesuffix("."), also]
    if field.default is not None and not field.default_factory:
        parts.append(f"Default: {str(field.default).lower()}")
    return "".join(f"{part}. " for part in parts if part).rstrip()


def _kind(annotation: Any) -> Any:
    """The type of a value that is not None."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (kind for kind in get_args(annotation) if kind is not NoneType)
    return annotation
