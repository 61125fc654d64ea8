"""Grammars over the real SmolLM2 tokenizer, and walks through their masks."""

import random
from functools import cache

import numpy as np

from ingine.engine.grammar.compiler import GrammarCompiler
from ingine.engine.grammar.state import GrammarState
from ingine.engine.grammar.vocabulary import GrammarVocabulary
from ingine.engine.text.tokenizer import Tokenizer
from ingine.sampling_params import SamplingParams
from ingine.structured_outputs import StructuredOutputsParams
from tests.tiny_models import make_tokenizer, smollm2_path

SMOLLM2_VOCAB_SIZE = 49_152


@cache
def smollm2_tokenizer() -> Tokenizer:
    return Tokenizer.from_folder(smollm2_path())


@cache
def smollm2_compiler() -> GrammarCompiler:
    tokenizer = smollm2_tokenizer()
    vocabulary = GrammarVocabulary(
        tokenizer, vocab_size=SMOLLM2_VOCAB_SIZE, eos_token_ids={0, *tokenizer.eos_token_ids}
    )
    return GrammarCompiler(vocabulary)


@cache
def tiny_compiler() -> GrammarCompiler:
    """One token a byte, three special ones."""
    tokenizer = Tokenizer.from_transformers(make_tokenizer())
    return GrammarCompiler(
        GrammarVocabulary(tokenizer, vocab_size=tokenizer.num_tokens, eos_token_ids=tokenizer.eos_token_ids)
    )


def state_of(compiler: GrammarCompiler, params: SamplingParams | None = None, **asked) -> GrammarState:
    """Of `params`, or of ones with this `structured_outputs`. The model's ends are those of the
    vocabulary."""
    params = params or SamplingParams(structured_outputs=StructuredOutputsParams(**asked))
    grammar = compiler.compile(params.structured_outputs)
    return GrammarState(grammar, params, eos_token_ids=compiler.vocabulary.eos_token_ids)


def mask_of(state: GrammarState, num_words: int) -> np.ndarray:
    row = np.zeros(num_words, dtype=np.int32)
    assert state.fill(row), state.error
    return row


def allowed(row: np.ndarray) -> list[int]:
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def walk(state: GrammarState, num_words: int, rng: random.Random, max_tokens: int = 400) -> list[int]:
    """Token ids chosen at random of those allowed, up to an end or `max_tokens`.

    Half of the time of the first few: low ids are short tokens, which close what long ones keep open.
    """
    token_ids = []
    while len(token_ids) < max_tokens:
        choices = allowed(mask_of(state, num_words))
        ends = [token_id for token_id in choices if token_id in state.end_token_ids]
        if ends and rng.random() < 0.3:
            choices = ends
        elif rng.random() < 0.5:
            choices = choices[:64]
        token_id = rng.choice(choices)
        assert state.accept([token_id]), state.error
        token_ids.append(token_id)
        if token_id in state.end_token_ids:
            break
    return token_ids
