"""Options of `submit` and `generate` that say what an output looks like and which functions it may call."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Schema = Annotated[
    Path | None, typer.Option(metavar="FILE", help="A JSON schema, which the output is made to match.")
]
Tools = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Functions that the model may call: a JSON array, as `tools` in OpenAI's API. Calls are printed "
        "as lines of JSON.",
    ),
]
ToolChoice = Annotated[
    str | None,
    typer.Option(
        metavar="CHOICE", help="auto, none, required, or the name of the function that has to be called."
    ),
]


def with_schema(sampling: dict[str, Any], path: Path | None) -> dict[str, Any]:
    """Return the sampling parameters with the schema of `--schema`, as JSON text, if there is one."""
    if path is None:
        return sampling
    if sampling.get("structured_outputs") is not None:
        raise typer.BadParameter(
            "--sampling has structured_outputs too, and an output has one constraint", param_hint="--schema"
        )
    schema = _json_of(path, "--schema")
    if not isinstance(schema, dict):
        raise typer.BadParameter(f"{path} must hold a JSON schema: an object", param_hint="--schema")
    # As text: a job is not nested as deep as a schema may be.
    text = json.dumps(schema, ensure_ascii=False, separators=(",", ":"))
    return sampling | {"structured_outputs": {"json": text}}


def chat_fields(tools: Path | None, tool_choice: str | None, *, chat: bool) -> dict[str, Any]:
    """Return those of `tools` and `tool_choice` that were given, as OpenAI has them. chat: the job is one."""
    for option, value in (("--tools", tools), ("--tool-choice", tool_choice)):
        if value is not None and not chat:
            raise typer.BadParameter("needs a chat: leave out --raw", param_hint=option)
    if tools is None:
        if tool_choice is not None:
            raise typer.BadParameter("needs --tools", param_hint="--tool-choice")
        return {}
    found = _json_of(tools, "--tools")
    if not isinstance(found, list) or not found or not all(isinstance(tool, dict) for tool in found):
        raise typer.BadParameter(
            f"{tools} must hold an array of functions, as in "
            '[{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]',
            param_hint="--tools",
        )
    return {"tools": found} | ({} if tool_choice is None else {"tool_choice": _choice(tool_choice)})


def _choice(value: str) -> str | dict[str, Any]:
    if value in ("auto", "none", "required"):
        return value
    return {"type": "function", "function": {"name": value}}


def _json_of(path: Path, option: str) -> Any:
    """Read a file of JSON. Raises BadParameter."""
    try:
        return json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}", param_hint=option) from None
    except (ValueError, RecursionError) as error:  # also bytes that are no UTF-8
        raise typer.BadParameter(f"{path} is not JSON: {error}", param_hint=option) from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
