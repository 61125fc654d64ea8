"""Walks at random through a grammar's masks, without a model, and what their ends are worth."""

import json
import random
import re
import warnings

import jsonschema
import numpy as np

from ingine.engine.grammar.compiler import GrammarCompiler
from ingine.engine.grammar.state import GrammarState
from ingine.engine.grammar.vocabulary import GrammarVocabulary
from ingine.engine.text.tokenizer import Tokenizer
from ingine.sampling_params import SamplingParams
from ingine.structured_outputs import StructuredOutputsParams

VOCAB_SIZE = 49_152
CLOSING, CLOSING_IN_STRING = b'}]"', b'"'
"""The bytes that a walk prefers when it is to end, the first one that is allowed."""
WEIGHTS = {
    **dict.fromkeys(map(ord, " \t\n\r"), 0.005),
    **dict.fromkeys(range(0x80, 0x100), 0.01),
    **dict.fromkeys(map(ord, "abcxyzABC"), 0.3),
    **dict.fromkeys(b"0123456789", 0.4),
    **dict.fromkeys(b"}]", 2.0),
    **dict.fromkeys(b'",{[', 4.0),
    **dict.fromkeys(b"\\-.eE", 0.5),
}
OTHER_WEIGHT = 0.08
END_PROBABILITY = 0.6
ANY_TOKEN_PROBABILITY = 0.05


class Walker:
    """Chooses among the tokens that a grammar allows, mostly those of one byte: they reach more places than
    long tokens do, and close what they have opened."""

    def __init__(self, compiler: GrammarCompiler):
        self.compiler = compiler
        tokenizer = compiler.vocabulary.ll_tokenizer
        ids = [tokenizer.tokenize_bytes(bytes([byte])) for byte in range(256)]
        known = [(byte, one[0]) for byte, one in enumerate(ids) if len(one) == 1]
        self._bytes, self._ids = (np.array(column) for column in zip(*known, strict=True))
        self._weights = np.array([WEIGHTS.get(byte, OTHER_WEIGHT) for byte in self._bytes.tolist()])
        self._places = {byte: int((self._bytes == byte).argmax()) for byte in CLOSING}

    def state(self, params: StructuredOutputsParams) -> GrammarState:
        return GrammarState(
            self.compiler.compile(params),
            SamplingParams(structured_outputs=params),
            eos_token_ids=self.compiler.vocabulary.eos_token_ids,
        )

    def walk(
        self, state: GrammarState, rng: random.Random, *, close_after: int, max_tokens: int
    ) -> bytes | None:
        """The text of a walk, None if it has not ended within `max_tokens`. Raises AssertionError for a mask
        that is empty or that allows what the state then refuses."""
        row = np.zeros(state.num_words, dtype=np.int32)
        token_ids: list[int] = []
        while len(token_ids) < max_tokens:
            assert state.fill(row), state.error
            closing = b""
            if len(token_ids) >= close_after:
                closing = CLOSING_IN_STRING if _ends_in_string(self.text(token_ids)) else CLOSING
            token_id = self._choose(row, rng, closing)
            assert state.accept([token_id]), state.error
            if token_id in state.end_token_ids:
                return self.text(token_ids)
            token_ids.append(token_id)
        return None

    def text(self, token_ids: list[int]) -> bytes:
        return self.compiler.vocabulary.ll_tokenizer.decode_bytes(token_ids)

    def _choose(self, row: np.ndarray, rng: random.Random, closing: bytes) -> int:
        ends = [one for one in self.compiler.vocabulary.eos_token_ids if row[one // 32] >> one % 32 & 1]
        if ends and (closing or rng.random() < END_PROBABILITY):
            return ends[0]
        allowed = row[self._ids // 32] >> self._ids % 32 & 1
        for place in map(self._places.get, closing):
            if allowed[place] and rng.random() < 0.9:
                return int(self._ids[place])
        weights = self._weights * allowed
        total = weights.sum()
        if total == 0 or (not closing and rng.random() < ANY_TOKEN_PROBABILITY):
            bits = np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))
            return int(rng.choice(bits))
        place = np.searchsorted(weights.cumsum(), rng.random() * total, side="right")
        return int(self._ids[min(place, len(self._ids) - 1)])


def _ends_in_string(text: bytes) -> bool:
    return len(re.findall(rb'"', re.sub(rb"\\\\.", b"", text, flags=re.S))) % 2 == 1


def packaged_compiler(folder) -> GrammarCompiler:
    """Over the tokens of the packaged small model."""
    tokenizer = Tokenizer.from_folder(folder)
    vocabulary = GrammarVocabulary(
        tokenizer, vocab_size=VOCAB_SIZE, eos_token_ids={0, *tokenizer.eos_token_ids}
    )
    return GrammarCompiler(vocabulary)


class Verdicts:
    """What `jsonschema` says about outputs of one schema."""

    def __init__(self, schema: dict):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
            self._validator = kind(schema)
            self._with_formats = kind(schema, format_checker=kind.FORMAT_CHECKER)
        try:
            kind.check_schema(schema)
            self.schema_error = None
        except Exception as error:
            self.schema_error = f"{getattr(error, 'json_path', '')} {getattr(error, 'message', error)!s:.100}"

    def __call__(self, text: bytes) -> str:
        """ "valid", "undecided: ..." or "invalid: ..."."""
        try:
            value = json.loads(text.decode())
        except ValueError as error:
            return f"invalid: not JSON: {error}"
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for error in self._validator.iter_errors(value):
                    return f"invalid: {error.validator}: {error.message:.200} at {error.json_path}"
                for error in self._with_formats.iter_errors(value):
                    return f"format: {error.validator}: {error.message:.200}"
        except Exception as error:  # a $ref that it cannot resolve, a pattern that Python cannot compile
            return f"undecided: {error!r:.150}"
        return "valid"
