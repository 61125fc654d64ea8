"""The gateway's description of itself, in OpenAPI 3.1, at `/openapi.json`."""

from functools import cache
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from ingine import __version__
from ingine.contract.chat import ChatFields
from ingine.gateway.encoding import Json
from ingine.sampling_params import SamplingParams

Schema = dict[str, Any]

_REF = "#/components/schemas/{model}"
_ERROR: Schema = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
_FLAG: Schema = {"type": ["boolean", "null"]}
_MODEL: Schema = {"type": "string", "minLength": 1, "description": "One that /v1/models lists."}
_STREAM = {
    "stream": _FLAG | {"description": "Answer with server-sent events."},
    "stream_options": {"type": ["object", "null"], "properties": {"include_usage": {"type": "boolean"}}},
}
_RESPONSE_ID = {"name": "response_id", "in": "path", "required": True, "schema": {"type": "string"}}


async def show_description(request: Request) -> Response:
    request.state.gateway.access.caller(request)
    return Json(describe())


@cache
def describe() -> dict[str, Any]:
    """Return the description. Fields of requests come from the models that validate jobs."""
    definitions: dict[str, Schema] = {"Error": _ERROR}
    sampling = _properties(SamplingParams, definitions) | {
        "max_completion_tokens": {"type": ["integer", "null"], "minimum": 1},
        "response_format": {"type": ["object", "null"]},
    }
    del sampling["logprobs"]
    chat = _properties(ChatFields, definitions)
    common = {"model": _MODEL, **_STREAM, **sampling}
    bodies = {
        "/v1/chat/completions": (["model", "messages"], common | chat | {"logprobs": _FLAG}),
        "/v1/completions": (["model", "prompt"], common | {"prompt": {"type": ["string", "array"]}}),
        "/v1/responses": (["model", "input"], _response_fields()),
    }
    paths = {
        path: {"post": _operation(f"create {path}", body=_body(*body), streams=True)}
        for path, body in bodies.items()
    }
    for path, summary in (
        ("/health", "Whether the gateway runs"),
        ("/v1/models", "The models that workers serve"),
    ):
        paths[path] = {"get": _operation(summary)}
    model_id = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    paths["/v1/models/{model}"] = {"get": _operation("One model", parameters=[model_id])}
    reading = [
        _RESPONSE_ID,
        {"name": "stream", "in": "query", "schema": {"type": "boolean"}},
        {"name": "starting_after", "in": "query", "schema": {"type": "integer"}},
    ]
    paths["/v1/responses/{response_id}"] = {
        "get": _operation("Read", parameters=reading, streams=True),
        "delete": _operation("Delete", parameters=[_RESPONSE_ID]),
    }
    paths["/v1/responses/{response_id}/cancel"] = {"post": _operation("Cancel", parameters=[_RESPONSE_ID])}
    return {
        "openapi": "3.1.0",
        "info": {"title": "ingine gateway", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": definitions,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


def _properties(model: type[Any], definitions: dict[str, Schema]) -> dict[str, Schema]:
    """Return the fields of a model, each of which may also be null. Adds its definitions."""
    schema = model.model_json_schema(ref_template=_REF)
    definitions |= schema.pop("$defs", {})
    return {name: {"anyOf": [field, {"type": "null"}]} for name, field in schema["properties"].items()}


def _response_fields() -> dict[str, Schema]:
    return {
        "model": _MODEL,
        "input": {"type": ["string", "array"]},
        "instructions": {"type": ["string", "null"]},
        "max_output_tokens": {"type": ["integer", "null"], "minimum": 1},
        "temperature": {"type": ["number", "null"], "minimum": 0},
        "top_p": {"type": ["number", "null"]},
        "tools": {"type": ["array", "null"]},
        "text": {"type": ["object", "null"]},
        "metadata": {"type": ["object", "null"]},
        "stream": _FLAG,
        "background": _FLAG | {"description": "The job goes on without its client."},
    }


def _body(required: list[str], properties: dict[str, Schema]) -> dict[str, Any]:
    schema = {"type": "object", "required": required, "properties": properties}
    return {"required": True, "content": {"application/json": {"schema": schema}}}


def _operation(
    summary: str,
    *,
    body: dict[str, Any] | None = None,
    parameters: list[dict[str, Any]] | None = None,
    streams: bool = False,
) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {"schema": {"type": "string"}}
    error = {"application/json": {"schema": {"$ref": _REF.format(model="Error")}}}
    answers = {
        "200": {"description": "The answer.", "content": content},
        "default": {"description": "An error.", "content": error},
    }
    operation: dict[str, Any] = {"summary": summary, "responses": answers}
    if body:
        operation["requestBody"] = body
    if parameters:
        operation["parameters"] = parameters
    return operation
