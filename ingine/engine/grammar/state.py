"""Where one sequence is in its grammar."""

from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from copy import copy

import numpy as np
from llguidance import LLMatcher

from ingine.engine.grammar.compiler import CompiledGrammar, one_line
from ingine.sampling_params import SamplingParams


class _Bits:
    """Tokens of a mask, as words and what to set or clear in them."""

    def __init__(self, token_ids: Iterable[int], num_words: int):
        mask = np.zeros(num_words, dtype=np.uint32)
        for token_id in token_ids:
            mask[token_id // 32] |= np.uint32(1 << token_id % 32)
        self._words = np.flatnonzero(mask)
        self._bits = mask[self._words].view(np.int32)

    def set(self, row: np.ndarray) -> None:
        row[self._words] |= self._bits

    def clear(self, row: np.ndarray) -> None:
        row[self._words] &= ~self._bits

    def any(self, row: np.ndarray) -> bool:
        return bool((row[self._words] & self._bits).any())


class GrammarState:
    """Which tokens a sequence may go on with: a pure function of its grammar, parameters and output tokens.

    An end (an end-of-sequence token, or one of `stop_token_ids`) is allowed where the grammar may end and
    nowhere else; before `min_tokens`, and an end-of-sequence token with `ignore_eos`, only where the grammar
    allows nothing else.

    Nothing here raises for what a grammar or a token does: `error` says what was wrong, and stays. For one
    thread at a time.
    """

    def __init__(
        self,
        grammar: CompiledGrammar,
        params: SamplingParams,
        *,
        eos_token_ids: Iterable[int] = (),
        begins_after: Tokens[int] = (),
    ):
        """eos_token_ids: all that the engine knows for this model; those beyond the model's logits are
        ignored.

        begins_after: token ids that end the reasoning. Up to and including their first occurrence in the
        output everything is allowed but an end. () for a grammar that begins with the output.
        """
        self.grammar = grammar
        vocabulary = grammar.vocabulary
        eos_token_ids = {id for id in eos_token_ids if id < vocabulary.vocab_size}
        stop_token_ids = {id for id in params.stop_token_ids if id < vocabulary.vocab_size}
        self.end_token_ids = frozenset(eos_token_ids | stop_token_ids | {*vocabulary.eos_token_ids})
        self.num_words = vocabulary.num_words
        """int32s of a mask."""
        self._min_tokens = params.min_tokens
        self._ends = _Bits(self.end_token_ids, vocabulary.num_words)
        self._free_ends = self._ends
        """Those that are allowed where the grammar allows other tokens too."""
        if params.ignore_eos:
            self._free_ends = _Bits(stop_token_ids, vocabulary.num_words)
        self._grammars_ends = _Bits(vocabulary.eos_token_ids, vocabulary.num_words)
        """Those that llguidance sets where the grammar may end."""
        self._ends_are_the_grammars = (
            self.end_token_ids == {*vocabulary.eos_token_ids} and not params.ignore_eos
        )
        self._begins_after = tuple(begins_after)
        self._token_ids: list[int] = []
        self._begin: int | None = None if self._begins_after else 0
        """Where in `_token_ids` the grammar begins, once that is known."""
        self._matcher = grammar.matcher()
        self._num_read_alone: int | None = None
        """How many tokens a matcher of its own has read at once; None for a matcher that shares."""
        self.error: str | None = None
        self.is_in_doubt = False
        """Whether `error` may come from what other sequences, or earlier masks of this one, have explored.
        `decide` finds out."""

    @property
    def num_tokens(self) -> int:
        return len(self._token_ids)

    @property
    def has_begun(self) -> bool:
        return self._begin is not None

    @property
    def is_terminated(self) -> bool:
        """Whether the grammar allows nothing more than an end."""
        return self.has_begun and self.error is None and self._matcher.is_stopped()

    def accept(self, token_ids: Tokens[int]) -> bool:
        """Go on by these tokens, an end aside, which only the last of them may be. False, with `error`, if
        they are not of the grammar."""
        for index, token_id in enumerate(token_ids):
            if self.has_begun:
                return self._consume([*token_ids[index:]])
            self._token_ids.append(token_id)
            if tuple(self._token_ids[-len(self._begins_after) :]) == self._begins_after:
                self._begin = len(self._token_ids)
        return self.error is None

    def rollback(self, num_tokens: int) -> None:
        """Take back the last `num_tokens` accepted tokens."""
        if num_tokens == 0:
            return
        del self._token_ids[-num_tokens:]
        if self._begin is None:
            return
        if self._begin > len(self._token_ids):
            self._begin = None
        # The library's own rollback is wrong for grammars with special tokens. To read the rest again takes a
        # microsecond a token.
        self._num_read_alone = None
        self._read_again(self.grammar.matcher())

    def ahead(self) -> "GrammarState":
        """A copy, to go on from here by tokens that may never come. It takes ten microseconds."""
        other = copy(self)
        other._token_ids = self._token_ids[:]
        if self.error is None:  # a failed state consumes nothing more
            other._matcher = self._matcher.deep_copy()
        return other

    def decide(self) -> "GrammarState":
        """Return a state after the same tokens, of a matcher that shares nothing. If it fails before it
        accepts another token, that error is not in doubt. Slow: it compiles the grammar."""
        other = copy(self)
        other._token_ids = self._token_ids[:]
        other._num_read_alone = len(self._token_ids)
        other._read_again(self.grammar.matcher_of_its_own())
        return other

    def fill(self, row: np.ndarray) -> bool:
        """Write the mask into `row` [num_words] int32, contiguous: bit t % 32 of word t // 32 says whether
        token t is allowed. False, with `error`, where none is; then `row` is as it may be."""
        if self.has_begun and self.error is None:
            self._matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        return self.complete(row)

    def allowed(self, vocab_size: int) -> np.ndarray:
        """[vocab_size] bool: what `fill` writes, a token at a time; all False where it returns False."""
        row = np.empty(self.num_words, dtype=np.int32)
        if not self.fill(row):
            return np.zeros(vocab_size, dtype=bool)
        return np.unpackbits(row.view(np.uint8), count=vocab_size, bitorder="little").astype(bool)

    def complete(self, row: np.ndarray) -> bool:
        """The rest of `fill`, for a row that `matcher` has written."""
        if self.error is not None:
            return False
        if not self.has_begun:
            row.fill(-1)
            self._ends.clear(row)
            return True
        if self._matcher.is_error():
            return self._fail()
        if not (self._ends_are_the_grammars and len(self._token_ids) >= self._min_tokens):
            self._gate(row)
        return self.error is None

    def forced_tokens(self) -> list[int]:
        """Tokens that the grammar allows nothing but: each is the only one that the mask at its place allows.
        [] where there is a choice."""
        if not self.has_begun or self.error is not None:
            return []
        return self._matcher.compute_ff_tokens()

    def num_allowed(self, draft: Tokens[int]) -> int:
        """How many tokens of a draft the grammar allows, or all of them before it has begun."""
        if not self.has_begun or self.error is not None or not draft:
            return len(draft)
        return self._matcher.validate_tokens([*draft])

    @property
    def matcher(self) -> LLMatcher | None:
        """What writes the mask, for those that fill many rows at a time and then `complete` each. None: there
        is nothing to write."""
        return self._matcher if self.has_begun and self.error is None else None

    def _tokens_of_the_grammar(self) -> list[int]:
        """An end is not for the matcher: it may be a token that is not of its vocabulary's ends."""
        token_ids = self._token_ids[self._begin :]
        return token_ids[:-1] if token_ids and token_ids[-1] in self.end_token_ids else token_ids

    def _consume(self, token_ids: list[int]) -> bool:
        self._token_ids += token_ids
        if token_ids and token_ids[-1] in self.end_token_ids:
            token_ids = token_ids[:-1]
        if self.error is None and not self._matcher.consume_tokens(token_ids):
            return self._fail()
        return self.error is None

    def _read_again(self, matcher: LLMatcher) -> None:
        self.error, self.is_in_doubt, self._matcher = None, False, matcher
        if self.has_begun and not matcher.consume_tokens(self._tokens_of_the_grammar()):
            self._fail()

    def _fail(self) -> bool:
        self.error = one_line(self._matcher.get_error())
        self.is_in_doubt = self._num_read_alone != len(self._token_ids)
        return False

    def _gate(self, row: np.ndarray) -> None:
        """Allow ends where the grammar may end, and only there."""
        may_end = self._grammars_ends.any(row)
        self._ends.clear(row)
        if may_end and len(self._token_ids) >= self._min_tokens:
            self._free_ends.set(row)
        if row.any():
            return
        if may_end:
            self._ends.set(row)
        else:
            self.error = "the grammar goes on with a stop token only"
