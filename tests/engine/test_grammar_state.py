"""Whatever the masks allow validates, and a state is a function of its tokens."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ingine.sampling_params import SamplingParams
from ingine.structured_outputs import StructuredOutputsParams
from tests.engine.grammars import allowed, mask_of, smollm2_compiler, smollm2_tokenizer, state_of, walk

SCHEMAS = {
    "object": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 12},
            "age": {"type": "integer", "minimum": 0, "maximum": 150},
            "tags": {"type": "array", "items": {"enum": ["a", "b\n", "é"]}, "maxItems": 3},
            "inner": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]},
        },
        "required": ["name", "inner"],
        "additionalProperties": False,
    },
    "recursive": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"v": {"type": ["number", "null"]}, "next": {"$ref": "#/$defs/node"}},
                "additionalProperties": False,
            }
        },
    },
    "any of": {"anyOf": [{"type": "string", "pattern": "^[a-z]{2,5}-[0-9]+$"}, {"const": {"k": [1, None]}}]},
}
ASKED = {name: {"json": schema} for name, schema in SCHEMAS.items()} | {
    "regex": {"regex": r"[a-f]{2,}(x|yz)*[0-9]{3}"},
    "choice": {"choice": ["red", "red-ish", "a.b|c", 'dé\n"/']},
    "lark": {"grammar": 'start: "(" start ")" | WORD\nWORD: /[a-z]{1,8}/'},
    "gbnf": {"grammar": 'root ::= item ("," item)*\nitem ::= [0-9]+ | "none"'},
    "special tokens": {"grammar": "start: <|im_start|> /[a-z]{3}/ <|im_start|> /[0-9]+/"},
}
VOCABULARY_WORDS = 49_152 // 32


def text_of(token_ids: list[int]) -> str:
    return smollm2_tokenizer().decode(token_ids)


def whole(asked: dict, seed: int) -> list[int] | None:
    """A walk that has ended, without its end. None: it was too long."""
    state = state_of(smollm2_compiler(), **asked)
    token_ids = walk(state, VOCABULARY_WORDS, random.Random(seed), max_tokens=250)
    return token_ids[:-1] if token_ids[-1] in state.end_token_ids else None


@pytest.mark.parametrize("name", SCHEMAS)
@settings(max_examples=10)
@given(seed=st.integers(0, 2**32))
def test_what_the_masks_allow_validates(name, seed):
    if (token_ids := whole(ASKED[name], seed)) is not None:
        jsonschema.validate(json.loads(text_of(token_ids)), SCHEMAS[name])


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32))
def test_a_regex_matches_and_a_choice_is_chosen(seed):
    if (token_ids := whole(ASKED["regex"], seed)) is not None:
        assert re.fullmatch(ASKED["regex"]["regex"], text_of(token_ids))
    assert text_of(whole(ASKED["choice"], seed)) in ASKED["choice"]["choice"]
    if (token_ids := whole(ASKED["gbnf"], seed)) is not None:
        assert re.fullmatch(r"([0-9]+|none)(,([0-9]+|none))*", text_of(token_ids))


@pytest.mark.parametrize("name", ASKED)
@settings(max_examples=3)
@given(seed=st.integers(0, 2**32))
def test_the_mask_after_all_tokens_is_the_one_after_each(name, seed):
    """Bit for bit: so a resumed sequence goes on as an uninterrupted one."""
    compiler = smollm2_compiler()
    stepwise = state_of(compiler, **ASKED[name])
    token_ids = walk(stepwise, VOCABULARY_WORDS, random.Random(seed), max_tokens=40)
    stepwise = state_of(compiler, **ASKED[name])
    for index, token_id in enumerate(token_ids):
        mask = mask_of(stepwise, VOCABULARY_WORDS)
        resumed = state_of(compiler, **ASKED[name])
        assert resumed.accept(token_ids[:index])
        np.testing.assert_array_equal(mask_of(resumed, VOCABULARY_WORDS), mask)
        assert resumed.is_terminated == stepwise.is_terminated
        assert resumed.forced_tokens() == stepwise.forced_tokens()
        assert stepwise.accept([token_id])


@pytest.mark.parametrize("name", ASKED)
@settings(max_examples=3)
@given(seed=st.integers(0, 2**32), num_back=st.integers(1, 30))
def test_what_is_rolled_back_was_never_there(name, seed, num_back):
    compiler = smollm2_compiler()
    state = state_of(compiler, **ASKED[name])
    token_ids = walk(state, VOCABULARY_WORDS, random.Random(seed), max_tokens=40)
    num_back = min(num_back, len(token_ids))
    state.rollback(num_back)
    before = state_of(compiler, **ASKED[name])
    assert before.accept(token_ids[: len(token_ids) - num_back])
    assert state.num_tokens == before.num_tokens
    np.testing.assert_array_equal(mask_of(state, VOCABULARY_WORDS), mask_of(before, VOCABULARY_WORDS))


@pytest.mark.parametrize("name", ASKED)
def test_a_copy_that_goes_ahead_changes_nothing(name):
    state = state_of(smollm2_compiler(), **ASKED[name])
    token_ids = walk(state.ahead(), VOCABULARY_WORDS, random.Random(5), max_tokens=20)
    before = mask_of(state, VOCABULARY_WORDS)
    ahead = state.ahead()
    assert ahead.accept(token_ids[:-1])
    np.testing.assert_array_equal(mask_of(state, VOCABULARY_WORDS), before)
    assert state.accept(token_ids[:-1])
    np.testing.assert_array_equal(mask_of(ahead, VOCABULARY_WORDS), mask_of(state, VOCABULARY_WORDS))


def test_a_forced_token_is_the_only_one_that_its_mask_allows():
    asked = {"json": {"const": {"a_long_name_for_a_key": "and its value", "another_key": [1, 2, 3]}}}
    state, num_forced = state_of(smollm2_compiler(), **asked), 0
    rng = random.Random(0)
    while not state.is_terminated:
        forced = state.forced_tokens()
        for token_id in forced:
            assert allowed(mask_of(state, VOCABULARY_WORDS)) == [token_id]
            assert state.accept([token_id])
        num_forced += len(forced)
        if not forced:
            assert state.accept([rng.choice(allowed(mask_of(state, VOCABULARY_WORDS))[:64])])
    assert num_forced > 10


def ends(params: SamplingParams, token_ids: list[int]) -> tuple[list[int], bool]:
    """The ends that are allowed after these tokens, and whether anything else is."""
    state = state_of(smollm2_compiler(), params)
    assert state.accept(token_ids)
    choices = allowed(mask_of(state, VOCABULARY_WORDS))
    found = [token_id for token_id in choices if token_id in state.end_token_ids]
    return found, len(found) < len(choices)


def params_of(**fields) -> SamplingParams:
    return SamplingParams(structured_outputs=StructuredOutputsParams(regex="ab?"), **fields)


def test_every_end_is_allowed_where_the_grammar_may_end_and_nowhere_else():
    [a], [b] = (smollm2_tokenizer().encode(text) for text in "ab")
    eos = [0, 2]
    assert ends(params_of(), []) == ([], True)
    assert ends(params_of(), [a]) == (eos, True)
    assert ends(params_of(), [a, b]) == (eos, False)
    assert ends(params_of(stop_token_ids=[77]), [a]) == ([*eos, 77], True)
    assert ends(params_of(stop_token_ids=[77]), []) == ([], True)


def test_min_tokens_and_ignore_eos_leave_an_end_where_there_is_nothing_else():
    [a], [b] = (smollm2_tokenizer().encode(text) for text in "ab")
    assert ends(params_of(min_tokens=5), [a]) == ([], True)
    assert ends(params_of(min_tokens=5), [a, b]) == ([0, 2], False)
    assert ends(params_of(ignore_eos=True), [a]) == ([], True)
    assert ends(params_of(ignore_eos=True), [a, b]) == ([0, 2], False)
    assert ends(params_of(ignore_eos=True, stop_token_ids=[77]), [a]) == ([77], True)


def test_a_grammar_that_goes_on_with_a_stop_token_alone_fails_and_says_so():
    [a], [b] = (smollm2_tokenizer().encode(text) for text in "ab")
    params = SamplingParams(structured_outputs=StructuredOutputsParams(regex="ab"), stop_token_ids=[b])
    state = state_of(smollm2_compiler(), params)
    assert state.accept([a])
    assert not state.fill(np.zeros(VOCABULARY_WORDS, dtype=np.int32))
    assert "stop token" in state.error
    assert not state.accept([b]) and not state.is_terminated and state.forced_tokens() == []


def test_tokens_that_are_not_of_the_grammar_fail_and_can_be_taken_back():
    [a] = smollm2_tokenizer().encode("a")
    state = state_of(smollm2_compiler(), params_of())
    assert state.accept([a])
    before = mask_of(state, VOCABULARY_WORDS)
    assert not state.accept([a]) and state.error
    state.rollback(1)
    assert state.error is None
    np.testing.assert_array_equal(mask_of(state, VOCABULARY_WORDS), before)


def test_a_sequence_that_fails_leaves_others_of_the_same_grammar_alone():
    [a], [b] = (smollm2_tokenizer().encode(text) for text in "ab")
    first, second = (state_of(smollm2_compiler(), params_of()) for _ in range(2))
    assert not first.accept([b])
    assert second.accept([a]) and b in allowed(mask_of(second, VOCABULARY_WORDS))
