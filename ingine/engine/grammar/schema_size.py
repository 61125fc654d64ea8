"""Sizes of JSON schemas that the library refuses late: after seconds or minutes, or within the output."""

from collections.abc import Iterable
from itertools import groupby

from ingine.engine.grammar.schema_document import Schema

MAX_OPTIONAL = 500
"""Properties in succession that may be left out. Each of them may come next, which the library counts as four
items of a step; more are over its limit, `max_items_in_row`. It takes time in the square of their number."""
MAX_PATTERNS = 256
"""The most patterns of an object's keys. The library intersects them, in time that grows with the cube of
their number: 0.4 s for 200, minutes for 1,500."""


def size_fault(schemas: list[Schema]) -> str | None:
    """Name what of these schemas is too large. `schemas` is the whole document: a property that any of them
    requires is not counted as optional."""
    required = {name for schema in schemas for name in _names(schema.get("required"))}
    for schema in schemas:
        properties, patterns = schema.get("properties"), schema.get("patternProperties")
        if isinstance(properties, dict) and len(properties) > MAX_OPTIONAL:
            num_optional = _longest_run(
                name not in required for name, value in properties.items() if value is not False
            )
            if num_optional > MAX_OPTIONAL:
                count = f"{num_optional} optional ones in succession, and {MAX_OPTIONAL} is the limit"
                return f"properties: {count}: require some of them"
        if isinstance(patterns, dict) and len(patterns) > MAX_PATTERNS:
            return f"patternProperties: {len(patterns)} patterns, and {MAX_PATTERNS} is the limit"
    return None


def _names(required: object) -> Iterable[str]:
    return (name for name in required if isinstance(name, str)) if isinstance(required, list) else ()


def _longest_run(flags: Iterable[bool]) -> int:
    return max((sum(1 for _ in run) for flag, run in groupby(flags) if flag), default=0)
