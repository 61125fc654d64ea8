"""A JSON schema as a graph of its subschemas."""

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

APPLICATORS = ("const", "enum", "allOf", "anyOf", "oneOf", "$ref")
"""Keywords between which the library does not connect others."""
_ONE = ("items", "additionalItems", "additionalProperties")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties")
_DEFINITIONS = ("$defs", "definitions")

Schema = dict[str, Any]


def subschemas(schema: Schema) -> Iterator[Any]:
    """What the keywords that the library knows apply, references and definitions aside."""
    for name in _ONE:
        yield schema.get(name)
    for name in _LISTS:
        yield from _list(schema, name)
    for name in _MAPS:
        yield from _map(schema, name).values()


class SchemaDocument:
    """A root schema and what it refers to within itself."""

    def __init__(self, root: Schema):
        self._root = root
        base = root.get("$id", root.get("id"))
        self._base = base.partition("#")[0] if isinstance(base, str) else ""

    def reachable(self) -> list[Schema]:
        """The subschemas that an output may have to satisfy, the root first, each once."""
        found: dict[int, Schema] = {}
        waiting: list[Any] = [self._root]
        while waiting:
            schema = waiting.pop()
            if not isinstance(schema, dict) or id(schema) in found:
                continue
            found[id(schema)] = schema
            waiting += subschemas(schema)
            if isinstance(reference := schema.get("$ref"), str):
                target = self.target(reference)
                if target is None:  # by an anchor or another base: it may be any of them
                    waiting += (each for name in _DEFINITIONS for each in _map(self._root, name).values())
                    waiting += (each for name in _DEFINITIONS for each in _map(schema, name).values())
                else:
                    waiting.append(target)
        return [*found.values()]

    def endless(self) -> str | None:
        """Name a schema that has no finite value, such as an object that requires an object like itself; None
        if there is none among those that are reachable."""
        references = {
            reference: target
            for schema in self.reachable()
            if isinstance(reference := schema.get("$ref"), str)
            and (target := self.target(reference)) is not None
        }
        finite: set[str] = set()
        users: dict[str, list[str]] = {reference: [] for reference in references}
        for reference, target in references.items():
            for used in _references_within(target) & references.keys():
                users[used].append(reference)
        waiting = [*references]
        while waiting:
            reference = waiting.pop()
            if reference not in finite and self._is_finite(references[reference], finite, references):
                finite.add(reference)
                waiting += users[reference]
        return next((f"$ref {name:.100}" for name in references if name not in finite), None)

    def _is_finite(self, schema: Any, finite: set[str], references: dict[str, Any]) -> bool:
        """Whether some finite value may satisfy a schema, given the references of which that is known. True
        where only more than this would tell."""

        def ends(schema: Any) -> bool:
            if not isinstance(schema, dict):
                return True
            reference = schema.get("$ref")
            if isinstance(reference, str) and reference in references and reference not in finite:
                return False
            alternatives = [_list(schema, name) for name in ("anyOf", "oneOf")]
            return (
                all(map(ends, _list(schema, "allOf")))
                and all(not options or any(map(ends, options)) for options in alternatives)
                and any(one(schema) for one in _kinds(schema))
            )

        def array_ends(schema: Schema) -> bool:
            least = schema.get("minItems")
            least = least if isinstance(least, int) else 0
            items = schema.get("items")
            first = items if isinstance(items, list) else _list(schema, "prefixItems")
            rest = schema.get("additionalItems") if isinstance(items, list) else items
            return all(map(ends, first[:least])) and (len(first) >= least or ends(rest))

        def object_ends(schema: Schema) -> bool:
            required, properties = _list(schema, "required"), _map(schema, "properties")
            other = None if "patternProperties" in schema else schema.get("additionalProperties")
            return all(ends(properties.get(name, other)) for name in required if isinstance(name, str))

        def _kinds(schema: Schema) -> list:
            types = schema.get("type")
            types = types if isinstance(types, list) else [types]
            by_type = {"array": array_ends, "object": object_ends}
            return [by_type.get(name if isinstance(name, str) else "", lambda _: True) for name in types]

        return ends(schema)

    def target(self, reference: Any) -> Any:
        """What a JSON pointer of this document points to, None if it is none or leads nowhere."""
        if not isinstance(reference, str):
            return None
        base, _, fragment = reference.partition("#")
        if base not in ("", self._base) or (fragment and not fragment.startswith("/")):
            return None
        found: Any = self._root
        for segment in fragment.split("/")[1:]:
            name = unquote(segment).replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, dict) and name in found:
                found = found[name]
            else:
                return None
        return found


def _references_within(schema: Any) -> set[str]:
    found: set[str] = set()
    waiting = [schema]
    while waiting:
        schema = waiting.pop()
        if isinstance(schema, dict):
            if isinstance(reference := schema.get("$ref"), str):
                found.add(reference)
            waiting += subschemas(schema)
    return found


def _list(schema: Schema, name: str) -> list[Any]:
    value = schema.get(name)
    return value if isinstance(value, list) else []


def _map(schema: Schema, name: str) -> Schema:
    value = schema.get(name)
    return value if isinstance(value, dict) else {}
