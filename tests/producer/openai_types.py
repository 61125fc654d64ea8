"""OpenAI's types of responses, against which bodies are checked field by field.

`openai_types.json` has the JSON schemas of the types in the package `openai`, of the version that it names,
without what no body here has: audio, annotations, moderation, custom tools.
"""

import json
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

EXTENSIONS = {"reasoning", "stop_reason", "prompt_logprobs"}
"""Fields of vLLM that bodies have in addition."""


def _closed(schema: Any) -> Any:
    """The schema, which now refuses every field that it does not name."""
    if isinstance(schema, list):
        return [_closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    closed = {name: _closed(value) for name, value in schema.items()}
    if "properties" in schema:
        closed["properties"] |= dict.fromkeys(EXTENSIONS, True)
        closed["additionalProperties"] = False
    return closed


TYPES = {
    name: Draft202012Validator(_closed(schema))
    for name, schema in json.loads(Path(__file__).with_suffix(".json").read_text()).items()
    if name != "openai"
}
_OF_OBJECTS = {"chat.completion": "ChatCompletion", "text_completion": "Completion"}


def check_body(body: dict[str, Any]) -> None:
    """Raise ValidationError unless the body of a response has OpenAI's shape, after a round trip in JSON."""
    TYPES[_OF_OBJECTS[body["object"]]].validate(json.loads(json.dumps(body)))
