"""Whatever the grammar of a tool choice allows is read as calls of the functions, with valid arguments."""

import json
import random
from functools import cache

import jsonschema
import numpy as np
import pytest

from ingine.engine.grammar.compiler import GrammarCompiler
from ingine.engine.grammar.state import GrammarState
from ingine.engine.grammar.tools import ToolConstraint, tool_constraint
from ingine.engine.grammar.vocabulary import GrammarVocabulary
from ingine.engine.message_format import MessageFormat, NamedFunction
from ingine.engine.parsers.message_parser import functions_of, parser_of
from ingine.engine.parsers.tool_formats import TOOL_CALL, TOOL_CALLS
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import ErrorCode, InvalidRequest
from ingine.message import Message
from ingine.sampling_params import SamplingParams
from ingine.structured_outputs import StructuredOutputsParams
from tests.engine.chat_families import byte_level, sentencepiece
from tests.engine.grammars import allowed, mask_of, smollm2_compiler, smollm2_tokenizer
from tests.tiny_models import make_tokenizer

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "label": {"$ref": "#/$defs/label"}},
    "required": ["x"],
    "additionalProperties": False,
    "$defs": {"label": {"type": "string", "maxLength": 3}},
}
TREE = {
    "properties": {"v": {"enum": ["a", "}]", None]}, "next": {"$ref": "#"}},
    "additionalProperties": False,
    "minProperties": 1,
}
LABELLED = {"$ref": "#/$defs/label", "$defs": {"label": {"type": "object", "additionalProperties": False}}}
NODE = {
    "$ref": "#/$defs/Node",
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {"children": {"type": "array", "items": {"$ref": "#/$defs/Node"}, "maxItems": 1}},
            "required": ["children"],
            "additionalProperties": False,
        }
    },
}
"""As pydantic writes a model that contains itself."""
SCHEMAS = {"node": NODE, "point": POINT, "points": TREE, "get.label-2": LABELLED, 'quoted "é"': POINT}


def tool(name: str, schema: object = None, **more) -> dict:
    function = {"name": name, **more} | ({} if schema is None else {"parameters": schema})
    return {"type": "function", "function": function}


TOOLS = [*(tool(name, schema) for name, schema in SCHEMAS.items()), tool("anything")]
STRICT = [tool(each["function"]["name"], each["function"].get("parameters"), strict=True) for each in TOOLS]
MIXED = [*STRICT[:3], *TOOLS[3:]]
VALID = SCHEMAS | {"anything": {"type": "object"}}


@cache
def compiler(name: str) -> GrammarCompiler:
    """`plain` has no token for a tag, and `smollm2` is of the real size."""
    if name == "smollm2":
        return smollm2_compiler()
    tokenizer = tokenizer_of(name)
    [eos] = tokenizer.encode_word("<|im_end|>")
    vocabulary = GrammarVocabulary(tokenizer, vocab_size=tokenizer.num_tokens, eos_token_ids=[eos])
    return GrammarCompiler(vocabulary)


@cache
def tokenizer_of(name: str) -> Tokenizer:
    if name == "smollm2":
        return smollm2_tokenizer()
    made = {"byte level": byte_level, "sentencepiece": sentencepiece, "plain": make_tokenizer}[name]("x")
    return Tokenizer.from_transformers(made)


TOKENIZERS = ["plain", "byte level", "sentencepiece", "smollm2"]
NUM_WALKS = dict.fromkeys(TOKENIZERS, 12) | {"smollm2": 5}


def constraint_of(tools: list, choice=None, *, tokenizer="plain", **options) -> ToolConstraint | None:
    options = {"parallel_tool_calls": True, "tool_format": "hermes"} | options
    token_id = tokenizer_of(tokenizer).control_token_id
    return tool_constraint(tools, choice, token_id=token_id, **options)


def state_of(constraint: ToolConstraint, tokenizer: str = "plain") -> GrammarState:
    constraint.compile(compiler(tokenizer).compile)
    params = constraint.added_to(SamplingParams())
    grammar = compiler(tokenizer).compile(params.structured_outputs)
    return GrammarState(grammar, params, eos_token_ids=grammar.vocabulary.eos_token_ids)


def walk(state: GrammarState, marker: str, rng: random.Random) -> list[int] | None:
    """Random tokens that the masks allow, which write the marker now and then, in one token or in several.

    None if they are too many.
    """
    vocabulary, token_ids, wishes = state.grammar.vocabulary, [], []
    ends, closing, size = np.array([*state.end_token_ids]), _closing(vocabulary), vocabulary.vocab_size
    for _ in range(300):
        choices = state.allowed(size)
        may_end = choices[ends].any()
        choices[ends] = False
        if may_end and (not choices.any() or rng.random() < 0.07):
            return token_ids
        if not wishes and rng.random() < 0.3:
            one = vocabulary.token_id(marker)
            pieces = [vocabulary.token_id(char) for char in marker]
            wishes = [one] if one is not None and rng.random() < 0.5 else pieces
        wish = wishes.pop(0) if wishes else None
        some = closing[choices[closing]]
        if not len(some) or rng.random() < 0.5:
            some = np.flatnonzero(choices)
        token_id = wish if wish is not None and choices[wish] else int(rng.choice(some))
        assert state.accept([token_id]), state.error
        token_ids.append(token_id)
    return None


@cache
def _closing(vocabulary: GrammarVocabulary) -> np.ndarray:
    """Tokens that end something: what is chosen at random of all tokens hardly ever does."""
    texts = map(vocabulary.token_bytes, range(vocabulary.vocab_size))
    return np.array([index for index, text in enumerate(texts) if text[:1] in (b'"', b"}", b"]", b",")])


def text_of(token_ids: list[int], tokenizer: str) -> str:
    vocabulary = compiler(tokenizer).vocabulary
    return b"".join(map(vocabulary.token_bytes, token_ids)).decode(errors="replace")


def read(text: str, tools: list, choice="auto", tool_format="hermes") -> Message:
    format = MessageFormat(tool_format=tool_format, functions=functions_of(tools), tool_choice=choice)
    parser = parser_of(format)
    parser.feed(text)
    parser.flush()
    return parser.message()


def check_calls(message: Message, text: str, enforced: frozenset[str] = frozenset(VALID)) -> None:
    for call in message.tool_calls:
        arguments = json.loads(call.arguments)
        assert isinstance(arguments, dict), text
        if call.name in enforced:
            jsonschema.validate(arguments, VALID[call.name])


def walks(constraint: ToolConstraint, tokenizer: str, num_walks: int, marker: str = "{"):
    """The texts of random walks that end. A few are too long."""
    texts = []
    for seed in range(num_walks):
        token_ids = walk(state_of(constraint, tokenizer), marker, random.Random(seed))
        if token_ids is not None:
            texts.append(text_of(token_ids, tokenizer))
    assert texts
    return texts


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("parallel", [True, False])
def test_required_is_calls_and_nothing_else(tokenizer, parallel):
    constraint = constraint_of(TOOLS, "required", tokenizer=tokenizer, parallel_tool_calls=parallel)
    counts = set()
    for text in walks(constraint, tokenizer, NUM_WALKS[tokenizer]):
        message = read(text, TOOLS, "required")
        assert message.tool_calls and not message.content, text
        assert len(message.tool_calls) == len(json.loads(text))
        check_calls(message, text)
        counts.add(len(message.tool_calls))
    assert 1 in counts and (parallel or counts == {1})


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("name", VALID)
def test_a_named_function_gets_its_arguments(tokenizer, name):
    constraint = constraint_of(TOOLS, NamedFunction(name), tokenizer=tokenizer)
    for text in walks(constraint, tokenizer, 4):
        [call] = read(text, TOOLS, NamedFunction(name)).tool_calls
        assert call.name == name
        check_calls(read(text, TOOLS, NamedFunction(name)), text)


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("tool_format", ["hermes", "mistral"])
@pytest.mark.parametrize("parallel", [True, False])
def test_each_marker_in_free_text_begins_a_valid_call(tokenizer, tool_format, parallel):
    options = {"parallel_tool_calls": parallel, "tool_format": tool_format}
    constraint = constraint_of(MIXED, tokenizer=tokenizer, **options)
    marker, num_calls = {"hermes": TOOL_CALL, "mistral": TOOL_CALLS}[tool_format], 0
    for text in walks(constraint, tokenizer, 2 * NUM_WALKS[tokenizer], marker):
        message = read(text, MIXED, tool_format=tool_format)
        check_calls(message, text, frozenset({"node", "point", "points"}))
        # No call that was not read has become content.
        assert marker not in (message.content or ""), text
        assert bool(message.tool_calls) == (marker in text)
        assert parallel or len(message.tool_calls) <= 1
        num_calls += len(message.tool_calls)
    assert num_calls


FORMATS = {
    "hermes": ('<tool_call>\n{"name": "point", "arguments": {"x": 1}}\n</tool_call>', 1),
    "hermes twice": (
        'Well\n<tool_call>{"name": "point", "arguments": {"x": 1}}</tool_call>\n'
        '<tool_call>{"name": "anything", "arguments": {"y": [1]}}</tool_call> and',
        2,
    ),
    "mistral": ('[TOOL_CALLS] [{"name": "point", "arguments": {"x":1}}]', 1),
    "mistral array": (
        '[TOOL_CALLS][{"name": "point", "arguments": {"x": 1}}, {"name": "anything", "arguments": {}}]',
        2,
    ),
    "mistral args": ('Hm[TOOL_CALLS]point[ARGS]{"x": 1}[TOOL_CALLS]get.label-2[ARGS]{}', 2),
}


def tokens_of(text: str, tokenizer: str) -> list[int]:
    return tokenizer_of(tokenizer).encode_word(text)


def accepts(constraint: ToolConstraint, text: str | list[int], tokenizer: str) -> bool:
    """Whether each token is allowed where it comes, and an end after all of them."""
    state = state_of(constraint, tokenizer)
    for token_id in tokens_of(text, tokenizer) if isinstance(text, str) else text:
        if token_id not in allowed(mask_of(state, state.num_words)) or not state.accept([token_id]):
            return False
    return bool(state.end_token_ids & {*allowed(mask_of(state, state.num_words))})


@pytest.mark.parametrize("tokenizer", ["plain", "byte level", "smollm2"])
@pytest.mark.parametrize("name", FORMATS)
def test_what_models_write_is_allowed(tokenizer, name):
    text, num_calls = FORMATS[name]
    tool_format = name.split()[0]
    constraint = constraint_of(STRICT, tokenizer=tokenizer, tool_format=tool_format)
    assert accepts(constraint, text, tokenizer)
    assert len(read(text, STRICT, tool_format=tool_format).tool_calls) == num_calls
    assert accepts(constraint, "No call, but {1} < 2 and [3]\n", tokenizer)
    one = constraint_of(TOOLS, tokenizer=tokenizer, tool_format=tool_format, parallel_tool_calls=False)
    assert accepts(one, text, tokenizer) == (num_calls == 1)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>{"name": "point", "arguments": {"x": "1"}}</tool_call>',
        '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
        '<tool_call>{"arguments": {"x": "1"}, "name": "point"}</tool_call>',
        '<tool_call>{"name": "point", "arguments": {"x": 1}} </tool_call> <tool_call>hm',
        "<tool_call>",
        "a < b <tool_call",
    ],
)
def test_a_marker_in_one_token_or_in_pieces_binds_the_model(text):
    is_free = text.endswith("call")
    for name in ("plain", "byte level", "smollm2"):
        constraint, vocabulary = constraint_of(STRICT, tokenizer=name), compiler(name).vocabulary
        pieces = [vocabulary.token_id(char) for char in text if char != "\n"]
        assert accepts(constraint, pieces, name) == is_free
        assert accepts(constraint, text, name) == is_free


@pytest.mark.parametrize("choice", ["auto", "required"])
def test_the_masks_after_any_number_of_tokens_are_those_of_a_resumed_output(choice):
    constraint = constraint_of(MIXED, choice, tokenizer="byte level")
    token_ids = walk(state_of(constraint, "byte level"), TOOL_CALL, random.Random(4))
    stepwise = state_of(constraint, "byte level")
    for index, token_id in enumerate(token_ids):
        resumed = state_of(constraint, "byte level")
        assert resumed.accept(token_ids[:index])
        np.testing.assert_array_equal(
            mask_of(resumed, resumed.num_words), mask_of(stepwise, stepwise.num_words)
        )
        assert stepwise.accept([token_id])


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_control_tokens_are_those_that_the_library_matches_by_id(tokenizer):
    ours, vocabulary = tokenizer_of(tokenizer), compiler(tokenizer).vocabulary
    for token_id, added in ours._added_tokens.items():
        is_control = vocabulary.ll_tokenizer.is_special_token(token_id)
        assert ours.control_token_id(added.content) == (token_id if is_control else None), added
    assert ours.control_token_id("a") is None and ours.control_token_id("<nope>") is None


def test_the_model_is_free_where_nothing_is_to_be_enforced():
    assert constraint_of([], "auto") is None and constraint_of(None) is None
    assert constraint_of(TOOLS) is None and constraint_of(TOOLS, "auto") is None
    assert constraint_of(STRICT, "none") is None
    assert constraint_of(STRICT, "none", parallel_tool_calls=False) is None
    assert constraint_of([], parallel_tool_calls=False, tool_format="generic") is None


REFUSED = {
    "generic strict": (STRICT, {"tool_format": "generic"}, ErrorCode.UNSUPPORTED_GRAMMAR, "strict"),
    "qwen3_coder strict": (STRICT, {"tool_format": "qwen3_coder"}, ErrorCode.UNSUPPORTED_GRAMMAR, "strict"),
    "llama3_json strict": (STRICT, {"tool_format": "llama3_json"}, ErrorCode.UNSUPPORTED_GRAMMAR, "strict"),
    "no format": (STRICT, {"tool_format": None}, ErrorCode.UNSUPPORTED_GRAMMAR, "strict"),
    "parallel": (
        TOOLS,
        {"tool_format": "generic", "parallel_tool_calls": False},
        ErrorCode.INVALID_PARAMETER,
        "parallel_tool_calls",
    ),
    "unknown name": (TOOLS, {"choice": NamedFunction("g")}, ErrorCode.INVALID_PARAMETER, "'g'"),
    "unknown choice": (TOOLS, {"choice": "any"}, ErrorCode.INVALID_PARAMETER, "'any'"),
    "same name": ([*TOOLS, tool("point")], {"choice": "required"}, ErrorCode.INVALID_PARAMETER, "same name"),
}
BAD_SCHEMAS = {
    "keyword": ({"properties": {"a": {"not": {}}}}, ErrorCode.UNSUPPORTED_GRAMMAR, "not"),
    "reference": ({"$ref": "#/$defs/nowhere"}, ErrorCode.INVALID_GRAMMAR, "nowhere"),
    "no schema": ({"properties": 5}, ErrorCode.INVALID_GRAMMAR, "properties"),
    "text": ("a string", ErrorCode.INVALID_GRAMMAR, "object"),
    "list": ([1], ErrorCode.INVALID_GRAMMAR, "object"),
    "array": ({"type": "array"}, ErrorCode.INVALID_GRAMMAR, "object"),
    "itself": ({"$ref": "#"}, ErrorCode.INVALID_GRAMMAR, "finite"),
    "never": ({"required": ["a"], "additionalProperties": False}, ErrorCode.INVALID_GRAMMAR, "atisf"),
    "NaN": ({"properties": {"a": {"const": float("nan")}}}, ErrorCode.INVALID_GRAMMAR, "JSON"),
    "bytes": ({"const": b"x"}, ErrorCode.INVALID_GRAMMAR, "JSON"),
    "many": (
        {"properties": {f"p{index}": {} for index in range(2_000)}},
        ErrorCode.GRAMMAR_TOO_COSTLY,
        "2000 optional ones",
    ),
    "too many": (
        {"properties": {f"p{index}": {} for index in range(20_000)}},
        ErrorCode.INVALID_PARAMETER,
        "131072",
    ),
    "deep": (
        json.loads('{"items":' * 300 + "{}" + "}" * 300),
        ErrorCode.INVALID_GRAMMAR,
        "recursion",
    ),
    "remote": ({"$ref": "http://x/y.json"}, ErrorCode.UNSUPPORTED_GRAMMAR, "x/y.json"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_choice_that_cannot_be_enforced_is_refused_by_name(name):
    tools, options, code, says = REFUSED[name]
    with pytest.raises(InvalidRequest) as refused:
        constraint_of(tools, **options)
    assert (refused.value.code, says in str(refused.value)) == (code, True), refused.value


@pytest.mark.parametrize("choice", ["required", "auto", NamedFunction("bad")], ids=str)
@pytest.mark.parametrize("name", BAD_SCHEMAS)
def test_a_schema_that_cannot_be_enforced_is_refused_with_its_function(name, choice):
    schema, code, says = BAD_SCHEMAS[name]
    tools = [tool("good", POINT, strict=True), tool("bad", schema, strict=True)]
    with pytest.raises(InvalidRequest) as refused:
        constraint_of(tools, choice).compile(compiler("plain").compile)
    message = str(refused.value)
    assert (refused.value.code, says in message) == (code, True), message
    assert message.startswith("tools: ") and len(message) <= 500 and "\n" not in message
    assert "'bad'" in message or "JSON" in message or "131072" in message


def test_a_function_that_is_not_strict_may_have_a_schema_that_cannot_be_enforced():
    tools = [tool("good", POINT, strict=True), tool("bad", {"not": {}}), tool("text", "no schema")]
    constraint = constraint_of(tools)
    assert accepts(constraint, '<tool_call>{"name": "bad", "arguments": {"a": 1}}</tool_call>', "plain")
    assert constraint.schemas.keys() == {"good"}


def test_the_librarys_options_in_a_schema_change_nothing():
    odd = POINT | {"x-guidance": {"key_separator": "=", "lenient": True}}
    constraint = constraint_of([tool("point", odd)], NamedFunction("point"))
    assert accepts(constraint, '{"x": 1}', "plain") and not accepts(constraint, '{"x"= 1}', "plain")


def test_a_request_is_constrained_once():
    constraint = constraint_of(TOOLS, "required")
    params = SamplingParams(structured_outputs={"json": {}})
    with pytest.raises(InvalidRequest, match="structured_outputs") as refused:
        constraint.added_to(params)
    assert refused.value.code == ErrorCode.INVALID_PARAMETER
    assert constraint.added_to(SamplingParams(seed=3)).seed == 3


def test_the_grammar_is_in_proportion_to_the_schemas():
    def size(num_tools: int, num_properties: int) -> tuple[int, int]:
        schema = {"properties": {f"p{index}": {"type": "string"} for index in range(num_properties)}}
        tools = [tool(f"f{index}", schema, strict=True) for index in range(num_tools)]
        written = len(json.dumps(tools))
        return written, max(
            len(constraint_of(tools, **options).params.grammar)
            for options in (
                {"choice": "required"},
                {"tool_format": "hermes"},
                {"tool_format": "mistral"},
                {"tool_format": "mistral", "parallel_tool_calls": False},
            )
        )

    for num_tools, num_properties in ((1, 1), (1, 300), (300, 1), (30, 30)):
        given, made = size(num_tools, num_properties)
        assert made < 2 * given + 1000


def test_schemas_of_the_same_names_do_not_mix():
    """Each schema is the root of its references."""
    schemas = {
        "a": {"properties": {"v": {"$ref": "#/$defs/v"}}, "$defs": {"v": {"const": "a"}}, "required": ["v"]},
        "b": {"properties": {"v": {"$ref": "#/$defs/v"}}, "$defs": {"v": {"const": 2}}, "required": ["v"]},
        "c": {"$id": "http://x/c", "properties": {"v": {"$ref": "#/$defs/v"}}, "$defs": {"v": {"const": 3}}},
    }
    constraint = constraint_of([tool(name, schema) for name, schema in schemas.items()], "required")
    calls = '[{"name": "a", "parameters": {"v":"a"}}, {"name": "b", "parameters": {"v":2}}, %s]'
    assert accepts(constraint, calls % '{"name": "c", "parameters": {"v":3}}', "plain")
    assert not accepts(constraint, calls % '{"name": "c", "parameters": {"v":2}}', "plain")


@pytest.mark.parametrize("tokenizer", ["plain", "byte level"])
@pytest.mark.parametrize("trigger", ["<tool_call>", "[TOOL_CALLS]"])
def test_a_structural_tags_trigger_binds_the_model_in_one_token_and_in_pieces(tokenizer, trigger):
    structure = {"begin": f"{trigger}f", "schema": LABELLED["$defs"]["label"], "end": "!"}
    tag = {"structures": [structure], "triggers": [trigger]}
    asked = ToolConstraint(StructuredOutputsParams(structural_tag=tag), {})
    vocabulary = compiler(tokenizer).vocabulary
    for text, is_allowed in ((f"a {trigger}f{{}}! b", True), (f"a {trigger}hm", False), ("a <b", True)):
        assert accepts(asked, text, tokenizer) == is_allowed
        assert accepts(asked, [vocabulary.token_id(char) for char in text], tokenizer) == is_allowed
