"""The functions that a model may call, and what their schemas say of parameters."""

from collections.abc import Mapping
from typing import Any

_JSON_TYPES = {bool: "boolean", int: "integer", float: "number", dict: "object", list: "array"}


class Functions:
    """The functions that a parser reads calls of."""

    def __init__(self, schemas: Mapping[str, Mapping[str, Any]]):
        """schemas: name -> JSON schema of the parameters."""
        self._schemas = schemas
        self._types: dict[tuple[str, str], set[str]] = {}

    def __len__(self) -> int:
        return len(self._schemas)

    def __contains__(self, name: str | None) -> bool:
        return name in self._schemas

    def types_of(self, name: str, parameter: str) -> set[str]:
        """Return the JSON types that the schema of a function names for a parameter. Empty: any type. A
        parameter that the schema does not have is a string.

        Each schema is read once, however often a model writes the parameter: an `enum` may be long.
        """
        key = name, parameter
        if (types := self._types.get(key)) is not None:
            return types
        properties = self._schemas[name].get("properties")
        if not isinstance(properties, Mapping) or parameter not in properties:
            return {"string"}
        types = self._types[key] = types_of(properties[parameter])
        return types


def type_of(value: Any) -> str:
    """Return the JSON type of a value that was read from JSON."""
    return "null" if value is None else _JSON_TYPES.get(type(value), "string")


def types_of(schema: Any) -> set[str]:
    """Return the JSON types that a schema names by type, enum, anyOf or oneOf. Empty: any type."""
    if not isinstance(schema, Mapping):
        return set()
    named = schema.get("type")
    if isinstance(named, str):
        return {named}
    if isinstance(named, list):
        return {each for each in named if isinstance(each, str)}
    if isinstance(values := schema.get("enum"), list):
        return {type_of(value) for value in values}
    choices = schema.get("anyOf") or schema.get("oneOf")
    if not isinstance(choices, list):
        return set()
    types = [choice.get("type") if isinstance(choice, Mapping) else None for choice in choices]
    return {*types} if all(isinstance(each, str) for each in types) else set()
