"""The flags of `ingine worker`, made from `WorkerSettings`: no setting can be missing among them."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from ingine.config import EngineConfig
from worker.settings import Bytes, WorkerSettings

ENGINE_FIELDS = {field.name for field in fields(EngineConfig)}
NEGATION = "no_"
METAVARS = {str: "TEXT", int: "NUMBER", float: "NUMBER", Bytes: "BYTES"}


def with_flags(run: Callable[..., None]) -> Callable[..., None]:
    """`run` as a command whose options are the settings. It gets those that were given, as text or bool:
    settings are validated in one place, wherever they come from.
    """

    def command(**flags: object) -> None:
        for name in [name for name in flags if name.startswith(NEGATION)]:
            if flags.pop(name):
                flags[name.removeprefix(NEGATION)] = False
        run(**{name: value for name, value in flags.items() if value is not None})

    command.__doc__ = run.__doc__
    command.__annotations__ = {
        name: option for setting in WorkerSettings.model_fields.items() for name, option in _options(*setting)
    }
    command.__signature__ = inspect.Signature(
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=option)
        for name, option in command.__annotations__.items()
    )
    return command


def _options(name: str, field: FieldInfo) -> Iterator[tuple[str, Any]]:
    flag, kind = f"--{name.replace('_', '-')}", _kind(field.annotation)
    panel = "Engine" if name in ENGINE_FIELDS else "Options"
    options = {"show_default": False, "rich_help_panel": panel}
    if kind is bool:
        # The pair as one option would have a column of its own, and leave other flags no room at 80 columns.
        opposite = flag.replace("--", "--no-")
        yield (
            name,
            Annotated[bool | None, typer.Option(flag, help=_help(field, f"Opposite: {opposite}"), **options)],
        )
        hidden = typer.Option(opposite, help=f"The opposite of {flag}.", hidden=True)
        yield NEGATION + name, Annotated[bool | None, hidden]
    elif get_origin(kind) is Literal:
        choices = f"Choices: {', '.join(get_args(kind))}" if len(get_args(kind)) > 1 else ""
        described = _help(field, choices)
        yield name, Annotated[str | None, typer.Option(flag, help=described, metavar="NAME", **options)]
    else:
        metavar = METAVARS.get(kind, "TEXT")
        yield name, Annotated[str | None, typer.Option(flag, help=_help(field), metavar=metavar, **options)]


def _help(field: FieldInfo, also: str = "") -> str:
    """Description, `also` and default, each a sentence."""
    parts = [field.description.removesuffix("."), also]
    if field.default is not None and not field.default_factory:
        parts.append(f"Default: {str(field.default).lower()}")
    return "".join(f"{part}. " for part in parts if part).rstrip()


def _kind(annotation: Any) -> Any:
    """What it is when it is set."""
    if get_origin(annotation) in (Union, UnionType):
        (annotation,) = (kind for kind in get_args(annotation) if kind is not NoneType)
    return annotation
