"""JSON that every client can read, of what requests and logs contain."""

import json
import math
from typing import Any

from starlette.responses import Response

UNLIKELY = -9999.0
"""OpenAI's log probability of a token that cannot come: JSON has no infinity."""


def encode_json(value: Any) -> bytes:
    """Encode JSON on one line. Numbers that JSON lacks become UNLIKELY; halves of surrogate pairs, which a
    request may have as escapes, become escapes again."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except ValueError:
        text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:
        return json.dumps(json.loads(text), separators=(",", ":")).encode()


class Json(Response):
    """An answer in JSON."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return encode_json(content)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return UNLIKELY
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
