"""JSON schemas as the library has to read them, so that it enforces all of what they say.

The library refuses most of what it cannot enforce, but not all: where it is lax, a schema is rewritten to
mean the same, and refused where that is not possible.
"""

import json
import math
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from ingine.engine.grammar.schema_document import APPLICATORS, SchemaDocument
from ingine.engine.grammar.schema_patterns import WITHOUT_CONTROL, has_control, names_control, pattern_fault
from ingine.engine.grammar.schema_size import size_fault
from ingine.engine.grammar.source import refused
from ingine.errors import ErrorCode

_ESCAPES = 'nrbtf\\"'
"""What may follow a backslash. Without \\uXXXX: the library would take "\\u0061" for a key that is not "a",
and skip what the schema says of "a"."""
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "uniqueItems": (False,),
    "dependencies": ({},),
    "dependentRequired": ({},),
    "dependentSchemas": ({},),
    "propertyNames": (True, {}),
    "unevaluatedItems": (True, {}),
    "unevaluatedProperties": (True, {}),
    "not": (False,),
}
"""Keywords that the library does not know, and values with which they say nothing."""
_BOUNDS = (
    ("minimum", "exclusiveMinimum", math.inf, max),
    ("maximum", "exclusiveMaximum", -math.inf, min),
)
_LEAST_BOUND = 1e-40
"""Stands for an exclusive bound of 0 or near it. The library writes a bound as a regular expression that is
nested by digit, and has 250 levels."""
_STEPS = 8
"""Doubles from an exclusive bound to the inclusive one that stands for it: more than the library's error in
reading numbers of 17 digits."""
_MAX_DIGITS, _MAX_PLACES = 15, 10
"""Digits of a number that the library reads exactly, and decimal places of a `multipleOf`."""
_MAX_EXACT = 1 << 53
"""Beyond it not every integer is a double."""
_LARK_JSON = re.compile(r'"(?:\\.|[^"\\\n])*"|//[^\n]*|/(?:\\.|[^/\\\n])+/|(?P<json>%json)\s*')


def enforced(source: str, kind: str, is_satisfiable: Callable[[str], bool]) -> str:
    """source: as `grammar_source` returns it; kind: the field that it is from.

    is_satisfiable: whether any text matches a grammar, given as a source. Returns the source with each of its
    schemas rewritten. Raises InvalidRequest: UNSUPPORTED_GRAMMAR naming the keyword, INVALID_GRAMMAR where no
    text of finite length satisfies a schema, or GRAMMAR_TOO_COSTLY.
    """
    written = json.loads(source)
    rewriter = _Rewriter(kind, is_satisfiable)
    try:
        for grammar in written["grammars"]:
            if "json_schema" in grammar:
                grammar["json_schema"] = rewriter.rewritten(grammar["json_schema"])
            if "%json" in (grammar.get("lark_grammar") or ""):
                grammar["lark_grammar"] = _with_schemas(grammar["lark_grammar"], rewriter.rewritten)
    except RecursionError:
        raise refused(f"{kind}: nested too deep", ErrorCode.GRAMMAR_TOO_COSTLY) from None
    return json.dumps(written, ensure_ascii=False)


def _with_schemas(lark: str, rewrite: Callable[[Any], Any]) -> str:
    parts, position = [], 0
    while found := _LARK_JSON.search(lark, position):
        end = found.end()
        parts.append(lark[position:end])
        if found["json"]:
            try:
                schema, after = json.JSONDecoder().raw_decode(lark, end)
            except ValueError:  # the library says what is wrong
                after = end
            else:
                parts.append(json.dumps(rewrite(schema), ensure_ascii=False))
            end = after
        position = end
    return "".join([*parts, lark[position:]])


class _Rewriter:
    def __init__(self, kind: str, is_satisfiable: Callable[[str], bool]):
        self._kind = kind
        self._is_satisfiable = is_satisfiable

    def rewritten(self, root: Any) -> Any:
        if not isinstance(root, dict):
            return root
        root["x-guidance"] = self._options(root.get("x-guidance", {}))
        document = SchemaDocument(root)
        schemas = document.reachable()
        if fault := size_fault(schemas):
            raise refused(f"{self._kind}: {fault}", ErrorCode.GRAMMAR_TOO_COSTLY)
        # A base within the document may lead the library's references elsewhere.
        has_one_base = not any(isinstance(one.get("$id", one.get("id")), str) for one in schemas[1:])
        for schema in schemas:
            self._check(schema)
            _drop_neutral(schema)
            _order(schema)
            if has_one_base:
                _type_references(schema, document)
            for bound in _BOUNDS:
                _narrow(schema, *bound)
        if endless := document.endless():
            raise refused(f"{self._kind}: nothing finite satisfies {endless}")
        return root

    def _options(self, given: Any) -> Any:
        """The library's options, which a schema may have: those that could let through what is not JSON, or
        not of the schema, are refused."""
        if not isinstance(given, dict):
            raise self._unsupported("x-guidance has to be an object")
        for name in given:
            if name not in ("whitespace_flexible", "lenient", "coerce_one_of", "json_allowed_escapes"):
                raise self._unsupported(f"x-guidance: {name}")
        escapes = given.get("json_allowed_escapes")
        escapes = escapes if isinstance(escapes, str) else _ESCAPES
        return given | {"json_allowed_escapes": escapes.replace("u", "")}

    def _check(self, schema: dict[str, Any]) -> None:
        if "draft-03" in str(schema.get("$schema")):
            raise self._unsupported("$schema: draft 3")
        if isinstance(schema.get("required"), bool):
            raise self._unsupported("required: has to be a list, as since draft 4")
        self._check_patterns(schema)
        self._check_numbers(schema)
        least, required = schema.get("minProperties"), schema.get("required")
        num_required = len({*map(str, required)}) if isinstance(required, list) else 0
        if isinstance(least, int) and least > num_required + 1:
            # The library counts keys that may be the same.
            raise self._unsupported("minProperties: more than one above the number of required ones")

    def _check_patterns(self, schema: dict[str, Any]) -> None:
        pattern, keys = schema.get("pattern"), schema.get("patternProperties")
        for each in (pattern, *(keys if isinstance(keys, dict) else ())):
            if isinstance(each, str) and (fault := pattern_fault(each)):
                raise self._unsupported(f"pattern: {fault} in {each:.100}")
        if isinstance(pattern, str) and names_control(pattern):
            without = {"type": "string", "allOf": [{"pattern": pattern}, {"pattern": WITHOUT_CONTROL}]}
            if not self._is_satisfiable(json.dumps({"grammars": [{"json_schema": without}]})):
                raise self._unsupported(f"pattern: a control character in {pattern:.100}")

    def _check_numbers(self, schema: dict[str, Any]) -> None:
        step = schema.get("multipleOf")
        if isinstance(step, float) and Decimal(repr(step)) != Decimal(step):
            # Exact in decimals, but validators divide doubles: 0.59 would be no multiple of 0.01.
            raise self._unsupported(f"multipleOf: {step} is no binary fraction")
        values = schema.get("enum")
        for value in (schema.get("const"), *(values if isinstance(values, list) else ())):
            if fault := _value_fault(value):
                raise self._unsupported(f"{'const' if 'const' in schema else 'enum'}: {fault}")

    def _unsupported(self, reason: str):
        return refused(f"{self._kind}: {reason}", ErrorCode.UNSUPPORTED_GRAMMAR)


def _value_fault(value: Any) -> str | None:
    """What of a constant the library would write as another one, or could not write."""
    match value:
        case dict():
            return next(filter(None, map(_value_fault, value.values())), None)
        case list():
            return next(filter(None, map(_value_fault, value)), None)
        case str() if has_control(value):
            return "a control character"
        case int() | float() if abs(value) >= _MAX_EXACT or not _is_short(value):
            return f"{value!r:.30} has too many digits to be read exactly"
    return None


def _drop_neutral(schema: dict[str, Any]) -> None:
    for name, values in _NEUTRAL.items():
        if any(schema.get(name) is value or schema.get(name) == value == {} for value in values):
            del schema[name]
    if "if" in schema and not {"then", "else"} & schema.keys():
        del schema["if"]


def _order(schema: dict[str, Any]) -> None:
    """Put `additionalItems` behind `items`: the library does not connect them across an applicator."""
    if "items" in schema and "additionalItems" in schema and any(name in schema for name in APPLICATORS):
        following = schema.pop("additionalItems")
        rest = {name: schema.pop(name) for name in list(schema)}
        for name, value in rest.items():
            schema[name] = value
            if name == "items":
                schema["additionalItems"] = following


def _type_references(schema: dict[str, Any], document: SchemaDocument) -> None:
    """Say of each reference in `oneOf` which type it has: the library then looks behind it, and can tell
    whether the options exclude one another."""
    options = schema.get("oneOf")
    for option in options if isinstance(options, list) else ():
        target = document.target(option.get("$ref")) if isinstance(option, dict) else None
        if isinstance(target, dict) and "type" in target and "type" not in option:
            rest = {name: option.pop(name) for name in list(option)}
            option.update({"type": target["type"], **rest})


def _narrow(
    schema: dict[str, Any], name: str, exclusive_name: str, inwards: float, inner: Callable[..., Any]
) -> None:
    """Make bounds doubles, and exclusive ones such that no decimal within is read as the bound.

    `true` is draft 4's, and says that `minimum` is exclusive. The library reads 0 as above an exclusive 0 in
    places, so an inclusive bound stands for an exclusive one; not where that is nearer to 0, since it then
    wants all of the bound's digits: there the decimal places are limited.
    """
    bound, exclusive = schema.get(name), schema.get(exclusive_name)
    if isinstance(exclusive, bool):
        del schema[exclusive_name]
        if exclusive and _is_number(bound):
            bound, exclusive = None, schema.pop(name)
    found = [_inside(bound, inwards)] if _is_number(bound) else []
    if _is_number(exclusive):
        double = _inside(exclusive, inwards)
        grows = double == 0 or (double > 0) == (inwards > 0)
        if grows or abs(double) >= 10**_MAX_PLACES:
            schema.pop(exclusive_name, None)
            shifted = _shifted(double, inwards)
            found.append(shifted if abs(shifted) >= _LEAST_BOUND else math.copysign(_LEAST_BOUND, inwards))
        else:
            schema[exclusive_name] = double
            if schema.get("type") != "integer" and "multipleOf" not in schema:
                num_digits = len(str(int(abs(double))))
                schema["multipleOf"] = 10.0 ** -min(_MAX_PLACES, _MAX_DIGITS - 1 - num_digits)
    if found:
        schema[name] = inner(found)


def _inside(bound: float, inwards: float) -> float:
    """The bound, or one within it that the library reads exactly."""
    if abs(bound) < _MAX_EXACT:
        return bound if _is_short(bound) else _shifted(bound, inwards)
    try:
        double = float(bound)
    except OverflowError:
        return bound
    is_outside = double < bound if inwards > 0 else double > bound
    if is_outside or double == -(2.0**63):  # whose absolute value is no int64, which the library computes in
        double = math.nextafter(double, inwards)
    return int(double) if abs(double) < 2.0**64 else double


def _shifted(bound: float, inwards: float) -> float:
    for _ in range(_STEPS):
        bound = math.nextafter(bound, inwards)
    return int(bound) if abs(bound) >= _MAX_EXACT else bound


def _is_short(number: float) -> bool:
    """Whether the library, which rounds twice, surely reads the double that this is."""
    return isinstance(number, int) or len(Decimal(repr(number)).as_tuple().digits) <= _MAX_DIGITS


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
