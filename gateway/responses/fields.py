"""The fields of a response that its request decides. They lie in the job's metadata, for every gateway."""

import json
from typing import Any

from ingine.contract.jobs import MAX_METADATA_BYTES

_METADATA = "openai_response"
"""The field of the job's metadata that holds them, as JSON: a job may not be nested as deep as a schema."""
_DEFAULTS: dict[str, Any] = {
    "model": "",
    "instructions": None,
    "max_output_tokens": None,
    "temperature": None,
    "top_p": None,
    "tools": [],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "text": {"format": {"type": "text"}},
    "reasoning": {"effort": None, "summary": None},
    "metadata": {},
    "store": True,
    "user": None,
}
_LARGE = ("instructions", "tools", "text", "metadata")
"""Fields that are returned as their default, in that order, where all are too large for the metadata."""
_RESERVE_BYTES = 256


def response_fields(
    body: dict[str, Any], job_id: str, *, created_at: int, background: bool
) -> dict[str, Any]:
    """Return the fields of the response to `body`, which `metadata_of` can take."""
    given = {name: value for name in _DEFAULTS if (value := body.get(name)) is not None}
    fields = {"created_at": created_at, "background": background} | given
    for name in _LARGE:
        if len(json.dumps(fields)) <= MAX_METADATA_BYTES - _RESERVE_BYTES:
            break
        fields.pop(name, None)
    return _complete(fields, job_id)


def metadata_of(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a response's job."""
    stored = {name: value for name, value in fields.items() if value != _DEFAULTS.get(name, _Absent)}
    return {_METADATA: json.dumps(stored)}


def fields_of(job_id: str, metadata: dict[str, Any] | None) -> dict[str, Any]:
    """Return the fields that a job's metadata holds. Any other producer may have written them."""
    try:
        stored = json.loads((metadata or {})[_METADATA])
    except (KeyError, TypeError, ValueError, RecursionError):
        stored = {}
    return _complete(stored if isinstance(stored, dict) else {}, job_id)


class _Absent:
    """Equal to no default."""


def _complete(fields: dict[str, Any], job_id: str) -> dict[str, Any]:
    known = {name: fields[name] for name in ("created_at", "background", *_DEFAULTS) if name in fields}
    fixed = {"id": job_id, "object": "response", "previous_response_id": None, "truncation": "disabled"}
    return {"created_at": 0, "background": False} | _DEFAULTS | known | fixed
