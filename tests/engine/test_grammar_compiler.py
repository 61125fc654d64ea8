"""A grammar that cannot be enforced is refused by a stable code, at a bounded cost, and the cache is
bounded."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from ingine.engine.grammar import compiler as compiler_module
from ingine.engine.grammar.compiler import GrammarCompiler
from ingine.engine.grammar.source import grammar_source
from ingine.engine.grammar.vocabulary import GrammarVocabulary
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import ErrorCode, InvalidRequest
from ingine.structured_outputs import StructuredOutputsParams
from tests.engine.grammars import mask_of, smollm2_compiler, state_of, tiny_compiler
from tests.tiny_models import make_tokenizer

INVALID, UNSUPPORTED = ErrorCode.INVALID_GRAMMAR, ErrorCode.UNSUPPORTED_GRAMMAR
COSTLY = ErrorCode.GRAMMAR_TOO_COSTLY
NOT_STRING = {"not": {"type": "string"}}
TWO = [{"type": "object", "properties": {name: {"type": "string"}}} for name in "ab"]

REFUSED = {
    "not": ({"json": NOT_STRING}, UNSUPPORTED, "not"),
    "oneOf": ({"json": {"oneOf": TWO}}, UNSUPPORTED, "oneOf"),
    "uniqueItems": ({"json": {"type": "array", "uniqueItems": True}}, UNSUPPORTED, "uniqueItems"),
    "format": ({"json": {"type": "string", "format": "made-up"}}, UNSUPPORTED, "made-up"),
    "remote": ({"json": {"$ref": "http://example.com/x.json"}}, UNSUPPORTED, "example.com"),
    "lookahead": ({"json": {"type": "string", "pattern": "^(?!x)"}}, UNSUPPORTED, "look-ahead"),
    "lenient": ({"json": {"x-guidance": {"lenient": True}, **NOT_STRING}}, UNSUPPORTED, "not"),
    "coerced": ({"json": {"x-guidance": {"coerce_one_of": True}, "oneOf": TWO}}, UNSUPPORTED, "oneOf"),
    "tag format": ({"structural_tag": {"format": {}}}, UNSUPPORTED, "format"),
    "type": ({"json": {"type": "strin"}}, INVALID, "strin"),
    "no JSON": ({"json": "{"}, INVALID, "json"),
    "no object": ({"json": "[1]"}, INVALID, "object"),
    "injected": ({"json": '{} }, {"lark_grammar": "start: \\"a\\""'}, INVALID, "json"),
    "interval": ({"json": {"type": "integer", "minimum": 5, "maximum": 3}}, INVALID, "minimum"),
    "both": ({"json": {"allOf": [{"type": "string"}, {"type": "integer"}]}}, INVALID, ""),
    "$ref loop": ({"json": {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}}, INVALID, "satisf"),
    "empty class": ({"regex": r"[^\x00-\U0010ffff]"}, INVALID, "satisf"),
    "parenthesis": ({"regex": "(a"}, INVALID, "unclosed"),
    "no rule": ({"grammar": "start: foo"}, INVALID, "foo"),
    "endless rule": ({"grammar": "start: start"}, INVALID, "satisf"),
    "no grammar": ({"grammar": "hello"}, INVALID, "GBNF"),
    "no special token": ({"grammar": "start: <|nope|>"}, INVALID, "nope"),
    "no trigger": (
        {"structural_tag": {"structures": [{"begin": "<f", "schema": {}, "end": ""}], "triggers": ["<g"]}},
        INVALID,
        "trigger",
    ),
    "properties": (
        {"json": {"type": "object", "properties": {f"p{i}": {} for i in range(1200)}}},
        COSTLY,
        "properties: 1200 optional",
    ),
    "items": (
        {"json": {"type": "object", "properties": {f"p{i}": {} for i in range(500)}}},
        COSTLY,
        "items",
    ),
    "nested regex": ({"regex": "(" * 5000 + "a" + ")" * 5000}, COSTLY, "nest"),
    "nested schema": ({"json": '{"items":' * 5000 + "{}" + "}" * 5000}, INVALID, "recursion"),
    "nested rule": ({"grammar": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, COSTLY, "nested"),
    "nested GBNF": ({"grammar": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}, COSTLY, "nested"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_enforced_is_refused_by_its_name(name):
    asked, code, says = REFUSED[name]
    with pytest.raises(InvalidRequest) as refused:
        smollm2_compiler().compile(StructuredOutputsParams(**asked))
    message = str(refused.value)
    assert (refused.value.code, says in message) == (code, True), message
    assert message.startswith(f"structured_outputs.{next(iter(asked))}")
    assert len(message) <= 500 and "\n" not in message and "Enable" not in message


@pytest.mark.parametrize(
    "asked",
    [
        {"json": True},
        {"json": {}, "regex": "a"},
        {},
        {"json": "x" * (128 << 10) + "x"},
        {"choice": []},
        {"choice": ["a"] * 1025},
        {"regex": 5},
        {"json": {"enum": [b"bytes"]}},
        {"json": {"minimum": float("nan")}},
        {"disable_any_whitespace": True, "json": {}},
    ],
    ids=str,
)
def test_shape_and_size_are_checked_before(asked):
    with pytest.raises(ValueError, match="StructuredOutputsParams"):
        StructuredOutputsParams(**asked)


@pytest.mark.parametrize("regex", ["((((((((a{10}){10}){10}){10}){10}){10}){10}){10})", "x(a{1000}){100000}"])
def test_a_repetition_that_explodes_costs_no_more_than_a_step_may(regex):
    """The library would write all of it out to see what is forced."""
    state = state_of(smollm2_compiler(), regex=regex)
    assert state.forced_tokens() == []
    [first] = smollm2_compiler().vocabulary.ll_tokenizer.greedy_tokenize(regex.strip("(")[0])
    assert state.accept([first])
    assert mask_of(state, 49_152 // 32).any()


def test_a_step_over_its_limits_is_an_error_of_that_sequence(monkeypatch):
    monkeypatch.setitem(compiler_module.LIMITS, "step_lexer_fuel", 300)
    tokenizer = Tokenizer.from_transformers(make_tokenizer())
    vocabulary = GrammarVocabulary(tokenizer, vocab_size=tokenizer.num_tokens, eos_token_ids=[258])
    state = state_of(GrammarCompiler(vocabulary), regex=r"x(.*a.{30}){20}")
    assert state.accept(tokenizer.encode("x"))
    row = np.zeros(vocabulary.num_words, dtype=np.int32)
    for token_id in tokenizer.encode("ab" * 40):
        if not (state.fill(row) and state.accept([token_id])):
            break
    assert state.error and "\n" not in state.error


def test_a_schema_is_compiled_once():
    compiler = GrammarCompiler(tiny_compiler().vocabulary)
    first = compiler.compile(StructuredOutputsParams(json={"type": "integer"}))
    assert (
        compiler.compile(StructuredOutputsParams(json=json.dumps({"type": "integer"}, separators=(",", ":"))))
        is first
    )
    assert compiler.compile(StructuredOutputsParams(json={"type": "string"})) is not first


@pytest.mark.parametrize("code", [None, INVALID])
def test_threads_that_ask_for_the_same_grammar_compile_it_once(monkeypatch, code):
    compiler = GrammarCompiler(tiny_compiler().vocabulary)
    params = StructuredOutputsParams(json={"type": "integer"} if code is None else {"type": "strin"})
    begun, goes_on, num_compiled = threading.Event(), threading.Event(), 0

    def slow_source(*given):
        nonlocal num_compiled
        num_compiled += 1
        begun.set()
        assert goes_on.wait(30)
        return grammar_source(*given)

    monkeypatch.setattr(compiler_module, "grammar_source", slow_source)
    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(compiler.compile, params)
        assert begun.wait(30)
        monkeypatch.setattr(compiler, "_compiling", Watched(compiler._compiling, goes_on))
        second = threads.submit(compiler.compile, params)
        if code is None:
            assert second.result(30) is first.result(30)
        else:
            assert {one.exception(30).code for one in (first, second)} == {code}
    assert num_compiled == 1


class Watched(dict):
    """Sets an event once it has been looked into."""

    def __init__(self, content: dict, event: threading.Event):
        super().__init__(content)
        self._event = event

    def get(self, key):
        found = super().get(key)
        self._event.set()
        return found


def test_the_cache_is_bounded_in_entries_and_bytes():
    compiler = GrammarCompiler(tiny_compiler().vocabulary, max_grammars=2, max_bytes=10_000)
    a, b, c, large = ({"choice": ["a"]}, {"choice": ["b"]}, {"choice": ["c"]}, {"choice": ["x" * 9_990]})
    kept = {name: compiler.compile(StructuredOutputsParams(**asked)) for name, asked in (("a", a), ("b", b))}
    assert compiler.compile(StructuredOutputsParams(**a)) is kept["a"]  # the latest used
    compiler.compile(StructuredOutputsParams(**c))
    assert compiler.compile(StructuredOutputsParams(**a)) is kept["a"]
    assert compiler.compile(StructuredOutputsParams(**b)) is not kept["b"]
    compiler.compile(StructuredOutputsParams(**large))
    assert compiler.compile(StructuredOutputsParams(**a)) is not kept["a"]


def test_a_model_without_an_end_cannot_be_constrained():
    tokenizer = Tokenizer.from_transformers(make_tokenizer())
    with pytest.raises(InvalidRequest, match="no end-of-sequence token") as refused:
        GrammarVocabulary(tokenizer, vocab_size=tokenizer.num_tokens, eos_token_ids=[10_000])
    assert refused.value.code == ErrorCode.INVALID_PARAMETER


def test_masks_are_as_wide_as_the_models_logits():
    tokenizer = Tokenizer.from_transformers(make_tokenizer())
    vocabulary = GrammarVocabulary(tokenizer, vocab_size=320, eos_token_ids=[258])
    state = state_of(GrammarCompiler(vocabulary), regex="(?s:.*)")
    row = mask_of(state, vocabulary.num_words)
    assert len(row) == 10
    assert not row[9:].any() and row[0]  # no token is where the tokenizer has none
