"""The constraint on an output in which a model has to call tools, or to call them as their schemas say.

It is a `StructuredOutputsParams` like one that a request gives, and a pure function of the request and of the
model's format of tool calls, so that every attempt of a job has the same. What it allows is what
`ingine.engine.parsers` reads as calls of the functions, with arguments of their schemas.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ingine.engine.message_format import NamedFunction, ToolChoice
from ingine.engine.parsers.message_parser import functions_of
from ingine.engine.parsers.tool_formats import ARGS, CALL_ID, TOOL_CALL, TOOL_CALL_END, TOOL_CALLS
from ingine.errors import ErrorCode, InvalidRequest
from ingine.sampling_params import SamplingParams
from ingine.structured_outputs import MAX_GRAMMAR_BYTES, StructuredOutputsParams

TokenId = Callable[[str], int | None]
"""The id of the control token of that name, see `Tokenizer.control_token_id`."""

ANY_OBJECT = {"type": "object"}
MAX_REFERENCES = 8
"""Of one to another that are followed."""
_HEAD = ("%llguidance {}", r"TEXT: /(?s:.*)/", r"SPACE: /[ \n]/")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_.-]+")
"""A name that the parser of `mistral` reads without quotes."""


class ToolConstraint(NamedTuple):
    params: StructuredOutputsParams
    schemas: Mapping[str, StructuredOutputsParams]
    """Function -> the schema of its arguments alone. All of these are part of `params`. To compile each
    before tells which function cannot be enforced."""

    def compile(self, compile: Callable[[StructuredOutputsParams], object]) -> None:
        """Call `compile` with all grammars. Raises its InvalidRequest, with a message that names the
        function."""
        for name, schema in self.schemas.items():
            _compile(compile, schema, f"tools: the parameters of {name!r:.140}")
        if self.params not in self.schemas.values():
            _compile(compile, self.params, "tools")

    def added_to(self, params: SamplingParams) -> SamplingParams:
        """Return `params` with this constraint. Raises InvalidRequest if they have one."""
        if params.structured_outputs is not None:
            message = (
                "structured_outputs: the choice of tools constrains the output already: leave out one of them"
            )
            raise _refused(ErrorCode.INVALID_PARAMETER, message)
        return params.model_copy(update={"structured_outputs": self.params})


def tool_constraint(
    tools: Sequence[Mapping[str, Any]] | None,
    tool_choice: ToolChoice | None,
    *,
    parallel_tool_calls: bool,
    tool_format: str | None,
    token_id: TokenId,
) -> ToolConstraint | None:
    """Return what enforces a request's choice of tools; None if the model is free.

    tools: OpenAI's. tool_choice: None is `auto`. parallel_tool_calls: False allows one call at most.
    tool_format: a name of `TOOL_FORMATS`, in which the model calls tools where it is free to.

    `required` is a JSON array of {"name", "parameters"}, and a named function is called by its arguments
    alone: see `MessageParser`. With `auto`, free text may contain calls in the model's format. Those of
    functions that are `strict` have arguments of their schemas, those of others any object.

    Raises InvalidRequest: INVALID_PARAMETER for a choice or `parallel_tool_calls` that cannot be enforced,
    UNSUPPORTED_GRAMMAR for `strict` in a format that has no grammar, and INVALID_GRAMMAR for parameters that
    are not the schema of an object. Whether the grammar compiles is not known yet.
    """
    if not tools or tool_choice == "none":
        return None
    functions = functions_of(tools)
    if len(functions) < len(tools):
        raise _refused(ErrorCode.INVALID_PARAMETER, "tools: two functions have the same name")
    if isinstance(tool_choice, NamedFunction):
        return _named(functions, tool_choice.name)
    if tool_choice == "required":
        schemas = {name: _object_schema(name, schema) for name, schema in functions.items()}
        return _constraint(_required(schemas, parallel_tool_calls), schemas)
    if tool_choice not in (None, "auto"):
        raise _refused(ErrorCode.INVALID_PARAMETER, f"tool_choice: there is no {tool_choice!r:.100}")
    strict = [tool["function"]["name"] for tool in tools if tool["function"].get("strict")]
    if not strict and parallel_tool_calls:
        return None
    if tool_format not in _FORMATS:
        raise _no_grammar(tool_format, is_strict=bool(strict))
    schemas = {name: _object_schema(name, functions[name]) for name in strict}
    free = dict.fromkeys(functions.keys() - schemas.keys(), ANY_OBJECT)
    in_order = {name: (schemas | free)[name] for name in functions}
    return _constraint(_FORMATS[tool_format](in_order, parallel_tool_calls, token_id), schemas)


def _named(functions: Mapping[str, Any], name: str) -> ToolConstraint:
    if name not in functions:
        message = f"tool_choice: no function {name!r:.140} is among the tools"
        raise _refused(ErrorCode.INVALID_PARAMETER, message)
    params = _schema_params(name, _object_schema(name, functions[name]))
    return ToolConstraint(params, {name: params})


def _required(schemas: Mapping[str, Any], parallel_tool_calls: bool) -> list[str]:
    return [f"start: {_array(parallel_tool_calls)}", *_objects(schemas, "parameters")]


def _hermes(schemas: Mapping[str, Any], parallel_tool_calls: bool, token_id: TokenId) -> list[str]:
    end, end_id = _literal(TOOL_CALL_END), token_id(TOOL_CALL_END)
    return [
        *_text_and_calls(parallel_tool_calls, TOOL_CALL, token_id),
        "call: trigger SPACE? object SPACE? end",
        f"end: {end}" if end_id is None else f"end: {end} | <[{end_id}]>",
        *_objects(schemas, "arguments"),
    ]


def _mistral(schemas: Mapping[str, Any], parallel_tool_calls: bool, token_id: TokenId) -> list[str]:
    """An array of objects, as older models write, or a name and its arguments."""
    args_id, call_id = token_id(ARGS), token_id(CALL_ID)
    before_arguments = _literal(ARGS) if args_id is None else f"<[{args_id}]>"
    if call_id is not None:
        before_arguments = f"(<[{call_id}]> /[A-Za-z0-9]{{9}}/)? {before_arguments}"
    named = [
        f"{_literal(name)} ({before_arguments})? arguments_{index}"
        for index, name in enumerate(schemas)
        if _PLAIN_NAME.fullmatch(name)
    ]
    return [
        *_text_and_calls(parallel_tool_calls, TOOL_CALLS, token_id),
        f"call: trigger SPACE? ({' | '.join([_array(parallel_tool_calls), *named])})",
        *_objects(schemas, "arguments"),
    ]


_FORMATS = {"hermes": _hermes, "mistral": _mistral}
"""Formats whose every call begins with a marker, and goes on in JSON."""


def _text_and_calls(parallel_tool_calls: bool, marker: str, token_id: TokenId) -> list[str]:
    """Text in which the marker begins a call, whether it is written by one token or by several. Where there
    may be one call alone, it ends the output."""
    marker_id = token_id(marker)
    return [
        "start: call* TEXT" if parallel_tool_calls else "start: call | TEXT",
        "trigger: spelled" if marker_id is None else f"trigger: spelled | TEXT <[{marker_id}]>",
        # Lazy: the lexeme ends with the first marker, and TEXT cannot contain one.
        f"spelled[lazy]: TEXT {_literal(marker)}",
    ]


def _array(parallel_tool_calls: bool) -> str:
    return '"[" object (", " object)* "]"' if parallel_tool_calls else '"[" object "]"'


def _objects(schemas: Mapping[str, Any], arguments: str) -> list[str]:
    """The rules `object`, and `arguments_0` and so on. Each schema is the root of its own references."""
    rules = ["object: " + " | ".join(f"object_{index}" for index in range(len(schemas)))]
    for index, (name, schema) in enumerate(schemas.items()):
        begin = f'{{"name": {_json(name)}, "{arguments}": '
        rules.append(f'object_{index}: {_literal(begin)} arguments_{index} "}}"')
        rules.append(f"arguments_{index}: %json {_json(schema)}")
    return rules


def _object_schema(name: str, schema: Any) -> Any:
    """The schema of an object that satisfies `schema`."""
    kind = schema.get("type", "object") if isinstance(schema, Mapping) else None
    if not (kind == "object" or (isinstance(kind, list | tuple) and "object" in kind)):
        message = (
            f"tools: the parameters of {name!r:.140} are not the schema of an object: set type to object"
        )
        raise _refused(ErrorCode.INVALID_GRAMMAR, message)
    # The library's own options could make it write what is not JSON.
    schema = {key: value for key, value in schema.items() if key != "x-guidance"}
    # A reference to a schema that contains itself may have nothing beside it.
    return schema if _refers_to_object(schema) else schema | ANY_OBJECT


def _refers_to_object(root: Mapping[str, Any]) -> bool:
    """Whether the root is a reference to the schema of an object within it."""
    schema: Any = root
    for _ in range(MAX_REFERENCES):
        reference = schema.get("$ref")
        if not (isinstance(reference, str) and reference.startswith("#/")):
            return False
        schema = root
        for part in reference[2:].split("/"):
            schema = schema.get(part) if isinstance(schema, Mapping) else None
        if not isinstance(schema, Mapping) or "$id" in schema:
            return False
        if schema.get("type") == "object":
            return True
    return False


def _constraint(rules: list[str], schemas: Mapping[str, Any]) -> ToolConstraint:
    text = "\n".join([*_HEAD, *rules])
    if len(text) > MAX_GRAMMAR_BYTES:
        message = f"tools: their grammar has {len(text)} bytes, and {MAX_GRAMMAR_BYTES} is the limit"
        raise _refused(ErrorCode.INVALID_PARAMETER, message)
    alone = {name: _schema_params(name, schema) for name, schema in schemas.items()}
    return ToolConstraint(StructuredOutputsParams(grammar=text), alone)


def _schema_params(name: str, schema: Any) -> StructuredOutputsParams:
    text = _json(schema)
    if len(text) > MAX_GRAMMAR_BYTES:
        message = f"tools: the parameters of {name!r:.140} have {len(text)} bytes"
        raise _refused(ErrorCode.INVALID_PARAMETER, f"{message}, and {MAX_GRAMMAR_BYTES} is the limit")
    return StructuredOutputsParams(json=text)


def _json(value: Any) -> str:
    """Return a value as JSON: ASCII text in one line. Raises InvalidRequest."""
    try:
        return json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        reason = f"tools: the parameters cannot be written as JSON: {error!s:.100}"
        raise _refused(ErrorCode.INVALID_GRAMMAR, reason) from None


def _literal(text: str) -> str:
    return json.dumps(text)


def _compile(
    compile: Callable[[StructuredOutputsParams], object], params: StructuredOutputsParams, subject: str
) -> None:
    try:
        compile(params)
    except InvalidRequest as error:
        message = str(error).removeprefix(f"structured_outputs.{params.kind}: ")
        raise _refused(error.code, f"{subject}: {message}") from None


def _no_grammar(tool_format: str | None, *, is_strict: bool) -> InvalidRequest:
    enforced = ", ".join(sorted(_FORMATS))
    if is_strict:
        message = f"tools: strict is not supported in the format of this model's tool calls, {tool_format}"
        advice = "leave it out, or set tool_choice to required or a function"
        return _refused(ErrorCode.UNSUPPORTED_GRAMMAR, f"{message}; it is in {enforced}: {advice}")
    message = f"parallel_tool_calls: false is not supported in this model's format, {tool_format}"
    return _refused(ErrorCode.INVALID_PARAMETER, f"{message}; it is in {enforced}: leave it out")


def _refused(code: ErrorCode, message: str) -> InvalidRequest:
    return InvalidRequest(code, message[:500])
