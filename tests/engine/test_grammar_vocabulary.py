"""A vocabulary with tokens of whole texts beside special ones: `<tool_call>` is one in many models."""

import json

import pytest

from ingine.engine.grammar.compiler import GrammarCompiler
from ingine.engine.grammar.vocabulary import GrammarVocabulary
from ingine.engine.text.tokenizer import Tokenizer
from tests.engine.grammars import allowed, mask_of, state_of
from tests.tiny_models import add_tokens, make_tokenizer

TEXTS, SPECIAL_TEXTS = ["<tool_call>", "[CALL]", '{"name": "'], ["<think>", "[THINK]"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    add_tokens(folder, TEXTS, SPECIAL_TEXTS)
    return Tokenizer.from_folder(folder)


@pytest.fixture(scope="module")
def compiler(tokenizer) -> GrammarCompiler:
    return GrammarCompiler(
        GrammarVocabulary(tokenizer, vocab_size=tokenizer.num_tokens, eos_token_ids=tokenizer.eos_token_ids)
    )


def asked(text: str) -> dict[str, dict]:
    """Grammars of each kind that write `text` behind an `a`, and then x or y."""
    escaped = "".join("\\" + char if char in "[]{}" else char for char in text)
    schema = {"enum": [f"{text}x", f"{text}y"], "x-guidance": {"whitespace_flexible": False}}
    structure = {"begin": "a", "schema": schema, "end": ""}
    return {
        "regex": {"regex": f"a{escaped}[xy]"},
        "choice": {"choice": [f"a{text}x", f"a{text}y"]},
        "grammar": {"grammar": f'start: "a" {json.dumps(text)} /[xy]/'},
        "json": {"json": {"enum": [f"a{text}x", f"a{text}y"]}},
        "structural_tag": {"structural_tag": {"structures": [structure], "triggers": ["a"]}},
    }


@pytest.mark.parametrize("kind", asked("x"))
@pytest.mark.parametrize("text", TEXTS + SPECIAL_TEXTS)
def test_a_text_that_is_also_a_token_can_be_written(tokenizer, compiler, text, kind):
    """What the mask allows and what is forced are accepted, and make up the text."""
    state = state_of(compiler, **asked(text)[kind])
    before = {"json": '"a', "structural_tag": 'a"'}.get(kind, "a")
    assert state.accept(tokenizer.encode(before))
    token_ids, forced = [], state.forced_tokens()
    while len(choices := allowed(mask_of(state, compiler.vocabulary.num_words))) == 1:
        token_ids += choices
        assert state.accept(choices), state.error
    assert forced in ([], token_ids)
    written = text if kind not in ("json", "structural_tag") else json.dumps(text)[1:-1]
    assert compiler.vocabulary.ll_tokenizer.decode_bytes(token_ids).decode() == written


def test_a_structure_may_end_with_the_name_of_a_token(tokenizer, compiler):
    structure = {"begin": "<tool_call>{", "schema": {"type": "boolean"}, "end": "}<tool_call>"}
    state = state_of(compiler, structural_tag={"structures": [structure], "triggers": ["<tool_call>"]})
    assert state.accept(tokenizer.encode("so <tool_call>{true"))
    for char in "}<tool_call>":
        (token_id,) = tokenizer.encode(char)
        assert token_id in allowed(mask_of(state, compiler.vocabulary.num_words))
        assert state.accept([token_id]), state.error


def test_a_grammar_that_names_the_token_by_its_id_looks_ahead(tokenizer, compiler):
    token_id = tokenizer.control_token_id("<tool_call>")
    state = state_of(compiler, grammar=f'start: "ab" end\nend: "<tool_call>" | <[{token_id}]>')
    assert state.forced_tokens() == tokenizer.encode("ab")
    assert state.accept(tokenizer.encode("ab"))
    assert {token_id, *tokenizer.encode("<")} <= {*allowed(mask_of(state, compiler.vocabulary.num_words))}
    assert state.accept([token_id])


@pytest.mark.parametrize("text", ["<tool_call>", *SPECIAL_TEXTS])
def test_a_special_token_is_found_by_its_name(compiler, text):
    assert compiler.vocabulary.is_special(text)
