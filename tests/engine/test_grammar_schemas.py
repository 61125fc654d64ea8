"""Where the grammar library is lax about a schema, it is enforced all the same, or refused by name."""

import json

import jsonschema
import pytest

from ingine.engine.grammar.compiler import GrammarCompiler
from ingine.errors import ErrorCode, InvalidRequest
from ingine.structured_outputs import StructuredOutputsParams
from tests.engine.grammars import allowed, mask_of, state_of, tiny_compiler

DRAFT_4 = "http://json-schema.org/draft-04/schema#"
OPEN = {"properties": {"a": {"type": "integer"}, "\n": {"type": "integer"}}, "additionalProperties": True}
EX_4 = {"$schema": DRAFT_4, "minimum": 5, "allOf": [{"type": "integer"}], "exclusiveMinimum": True}
NUMBER = {"type": "number"}
TUPLE = {"items": [{"type": "integer"}], "anyOf": [{"type": "array"}], "additionalItems": False}
SHAPES = {
    name: {
        "type": "object",
        "properties": {"kind": {"const": name}, size: {"type": "integer"}},
        "required": ["kind", size],
    }
    for name, size in (("circle", "radius"), ("square", "side"))
}
UNION = {"oneOf": [{"$ref": f"#/$defs/{name}"} for name in SHAPES] + [{"type": "null"}], "$defs": SHAPES}
SAME = {"oneOf": [{"$ref": "#/$defs/a"}, {"$ref": "#/$defs/b"}], "$defs": {"a": NUMBER, "b": NUMBER}}
NODE = {"type": "object", "properties": {"next": {"$ref": "#/$defs/node"}}, "required": ["next"]}
ENDLESS = "nothing finite satisfies"

INVALID = {
    "an escaped key": ({"type": "object", **OPEN}, r'{"\u0061":"x"}'),
    "an escaped key with the library's options": (
        {"type": "object", **OPEN, "x-guidance": {"json_allowed_escapes": None}},
        r'{"\u0061":"x"}',
    ),
    "an escaped key of a line feed": ({"type": "object", **OPEN}, r'{"\u000a":"x"}'),
    "a oneOf reference to another": (UNION, '{"kind":"square","radius":1}'),
    "an escaped key of a pattern": (
        {"type": "object", "patternProperties": {"^b": {"type": "integer"}}},
        r'{"\u0062":"x"}',
    ),
    "draft 4's exclusive bound behind an applicator": (EX_4, "5"),
    "additional items behind an applicator": ({"$schema": DRAFT_4, **TUPLE}, '[1,"x"]'),
    "an exclusive 0 and a maximum": ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "0"),
    "an exclusive 0 from below": ({"type": "number", "minimum": -0.5, "exclusiveMaximum": 0}, "-0"),
    "an exclusive bound of the same digits": (
        {"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 1.5},
        "1",
    ),
    "a decimal that is read as the bound": ({"type": "number", "exclusiveMaximum": 5}, "4." + "9" * 20),
    "a decimal that is read as the bound below": (
        {"type": "number", "exclusiveMinimum": -1234567},
        "-1234566." + "9" * 10,
    ),
    "a decimal that is read as 0": ({"type": "number", "exclusiveMinimum": 0}, "0." + "0" * 330 + "1"),
    "a bound that is no double": ({"type": "integer", "maximum": (1 << 53) + 3}, str((1 << 53) + 4)),
}

UNSUPPORTED = {
    "minProperties": {"type": "object", "minProperties": 2},
    "minProperties: ": {"type": "object", "required": ["a"], "minProperties": 3},
    "draft 3": {"$schema": "http://json-schema.org/draft-03/schema#", "disallow": "string"},
    "required": {"type": "integer", "required": True},
    "item_separator": {"type": "array", "x-guidance": {"item_separator": ";"}},
    "whitespace_pattern": {"type": "array", "x-guidance": {"whitespace_pattern": "x*"}},
    "json_allow_general_unicode_escapes": {"x-guidance": {"json_allow_general_unicode_escapes": True}},
    "[ in a class": {"type": "string", "pattern": "^[[:alpha:]]$"},
    "&& in a negated class": {"type": "string", "pattern": "^[^a&&b]$"},
    r"pattern: \W": {"type": "string", "pattern": r"^\W$"},
    r"pattern: \w in a negated class": {"patternProperties": {r"^[^\w]$": {}}},
    "oneOf": SAME,
    "oneOf ": UNION | {"$defs": SHAPES | {"square": {"$id": "http://example.com/y", **SHAPES["square"]}}},
    "multipleOf: 0.01": {"type": "number", "multipleOf": 0.01},
    "enum: 9007199254740993": {"enum": [1, [9007199254740993]]},
    "const: 0.30000000000000004": {"const": 0.30000000000000004},
    "const: a control character": {"const": {"a": "\x1b[0m"}},
    "pattern: a control character": {"type": "string", "pattern": r"a\x1b"},
}

VALID = {
    "an exclusive bound": ({"type": "integer", "exclusiveMinimum": -2, "exclusiveMaximum": 2}, "-1"),
    "an exclusive bound of a number": ({"type": "number", "exclusiveMaximum": 5}, "4.999999"),
    "an exclusive bound below": ({"type": "number", "exclusiveMinimum": -100}, "-99.9"),
    "draft 4's exclusive bound": (EX_4, "6"),
    "draft 4's inclusive bound": (EX_4 | {"exclusiveMinimum": False}, "5"),
    "an exclusive 0": ({"type": "number", "exclusiveMinimum": 0, "maximum": 0.5}, "0.0000001"),
    "all of int64": ({"type": "integer", "minimum": -(1 << 63), "maximum": (1 << 63) - 1}, str(10**18)),
    "minProperties with the required ones": (
        {"type": "object", "required": ["a", "b"], "minProperties": 3},
        '{"a":1,"b":2,"c":3}',
    ),
    "a tuple": ({"$schema": DRAFT_4, **TUPLE}, "[1]"),
    "uniqueItems: false": ({"type": "array", "uniqueItems": False}, "[1,1]"),
    "dependencies: {}": ({"type": "object", "dependencies": {}}, "{}"),
    "a class with an escaped bracket": ({"type": "string", "pattern": r"^[\[\]&]+$"}, '"[&]"'),
    "a class of bytes": ({"type": "string", "pattern": r"^[\x00-\x7f]*$"}, '"a"'),
    "backslash-a in a constant": ({"const": r"C:\a"}, r'"C:\\a"'),
    "if alone": ({"if": {"type": "string"}}, "1"),
    "oneOf references that exclude one another": (UNION, '{"kind":"square","side":1}'),
    "oneOf null": (UNION, "null"),
    "multipleOf 0.25": ({"type": "number", "multipleOf": 0.25}, "1.75"),
    "an unused definition": ({"type": "integer", "$defs": {"x": {"pattern": "[[a]]"}}}, "1"),
    "a list": (
        {"$ref": "#/$defs/n", "$defs": {"n": {"properties": {"next": {"$ref": "#/$defs/n"}}}}},
        '{"next":{"next":{}}}',
    ),
    "a tree": (
        {"anyOf": [{"type": "array", "minItems": 2, "items": {"$ref": "#"}}, {"type": "null"}]},
        "[null,[null,null]]",
    ),
}


def accepts(text: str, **asked) -> bool:
    """Whether a grammar allows a text and an end after it."""
    compiler = tiny_compiler()
    state = state_of(compiler, **asked)
    if not state.accept(compiler.vocabulary.ll_tokenizer.tokenize_bytes(text.encode())):
        return False
    return not state.end_token_ids.isdisjoint(allowed(mask_of(state, state.num_words)))


def is_valid(schema: dict, text: str) -> bool:
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind.check_schema(schema)
    return kind(schema).is_valid(json.loads(text))


@pytest.mark.parametrize("name", INVALID)
def test_what_the_schema_forbids_is_forbidden(name):
    schema, text = INVALID[name]
    assert not is_valid(schema, text)
    assert not accepts(text, json=schema)


@pytest.mark.parametrize("name", VALID)
def test_what_the_schema_allows_remains_allowed(name):
    schema, text = VALID[name]
    assert is_valid(schema, text)
    assert accepts(text, json=schema)


@pytest.mark.parametrize("says", UNSUPPORTED)
def test_what_would_be_enforced_loosely_is_refused_by_its_name(says):
    with pytest.raises(InvalidRequest) as refused:
        tiny_compiler().compile(StructuredOutputsParams(json=UNSUPPORTED[says]))
    assert refused.value.code == ErrorCode.UNSUPPORTED_GRAMMAR
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
        {"type": "object", "required": ["a"], "additionalProperties": {"$ref": "#"}},
        {"type": "array", "minItems": 1, "items": {"$ref": "#"}},
        {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
        {"properties": {"list": {"$ref": "#/$defs/node"}}, "$defs": {"node": NODE}},
        {
            "$id": "http://example.com/x",
            "anyOf": [{"$ref": "http://example.com/x#/$defs/a"}],
            "$defs": {
                "a": {"type": "array", "prefixItems": [{"$ref": "#/$defs/b"}], "minItems": 1},
                "b": {"allOf": [{"$ref": "#/$defs/a"}, {"type": "array"}]},
            },
        },
    ],
    ids=str,
)
def test_a_schema_that_never_ends_is_refused(schema):
    with pytest.raises(InvalidRequest, match=ENDLESS) as refused:
        tiny_compiler().compile(StructuredOutputsParams(json=schema))
    assert refused.value.code == ErrorCode.INVALID_GRAMMAR


def optional(number: int, **more) -> dict:
    return {"type": "object", "properties": {f"p{index}": {} for index in range(number)}, **more}


NESTED = {"type": "object", "properties": {"a": optional(501)}, "additionalProperties": False}
PATTERNS = {"type": "object", "patternProperties": {f"^{index:03}": {} for index in range(257)}}


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        (optional(501), "501 optional ones in succession"),
        (optional(9_000, required=["p0", "p8000"]), "7999 optional ones"),
        (NESTED, "501 optional ones"),
        ({"anyOf": [{"type": "null"}, {"$ref": "#/$defs/a"}], "$defs": {"a": optional(501)}}, "501 optional"),
        (PATTERNS, "257 patterns"),
    ],
    ids=["properties", "between required ones", "nested", "referred to", "patterns"],
)
def test_schemas_that_would_fail_within_the_output_or_take_long_are_refused_by_their_size(schema, says):
    tag = {"structures": [{"begin": "<f>", "schema": schema, "end": "</f>"}], "triggers": ["<f>"]}
    for asked in ({"json": schema}, {"structural_tag": tag}):
        with pytest.raises(InvalidRequest, match=says) as refused:
            tiny_compiler().compile(StructuredOutputsParams(**asked))
        assert refused.value.code == ErrorCode.GRAMMAR_TOO_COSTLY


@pytest.mark.parametrize(
    "schema",
    [
        optional(1_000, required=["p400", "p800"]),
        {"allOf": [optional(600), {"required": [f"p{index}" for index in range(600)]}]},
        {"type": "object", "properties": {f"p{index}": False for index in range(600)}},
    ],
    ids=["between required ones", "required elsewhere", "forbidden"],
)
def test_objects_of_which_few_properties_are_possible_at_once_may_have_many(schema):
    tiny_compiler().compile(StructuredOutputsParams(json=schema))


def test_schemas_within_other_grammars_are_enforced_too():
    schema = {"type": "object", **OPEN}
    tag = {"structures": [{"begin": "<f>", "schema": schema, "end": "</f>"}], "triggers": ["<f>"]}
    lark = f'start: "%json [[" /%json [0-9]/ %json {json.dumps(schema)} "x" // %json {{"pattern": "[[a]]"}}'
    for asked, before, after in (
        ({"structural_tag": tag}, "<f>", "</f>"),
        ({"grammar": lark}, "%json [[%json 1", "x"),
    ):
        assert accepts(before + '{"b":"x"}' + after, **asked)
        assert accepts(before + '{"a":1}' + after, **asked)
        assert not accepts(before + r'{"\u0061":"x"}' + after, **asked)
    for asked in ({"grammar": 'start: %json {"pattern": "[[a]]"}'}, {"json": '{"pattern": "[[a]]"}'}):
        with pytest.raises(InvalidRequest, match="in a class"):
            GrammarCompiler(tiny_compiler().vocabulary).compile(StructuredOutputsParams(**asked))
