"""Where one sequence is in its grammar."""

from collections.abc import Iterable
from collections.abc import Sequence as Tokens
from copy import copy

import numpy as np
from llguidance import LLMatcher

from ingine.engine.grammar.compiler import CompiledGrammar, one_line
from ingine.engine.grammar.reasoning import ReasoningTokens
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
        reasoning: ReasoningTokens | None = None,
    ):
        """eos_token_ids: all that the engine knows for this model; those beyond the model's logits are
        ignored.

        reasoning: the grammar begins after it. Within it everything is allowed but an end, and tokens that
        write its closing tag in pieces. None: the grammar begins with the output.
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
        self._reasoning = reasoning
        self._opening: _Bits | None = None
        """The token with which an output may begin its reasoning."""
        if reasoning is not None:
            self._spellings = vocabulary.spellings(reasoning.closing)
            if reasoning.opening is not None and reasoning.opening not in self.end_token_ids:
                self._opening = _Bits([reasoning.opening], vocabulary.num_words)
        self._token_ids: list[int] = []
        self._begin: int | None = None if reasoning is not None and reasoning.has_begun else 0
        """Where in `_token_ids` the grammar begins. None within the reasoning."""
        self._tail = b""
        """The end of the reasoning's text: as much as may begin its closing tag."""
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
            if self._may_open and token_id == self._reasoning.opening:
                self._begin = None
            if self.has_begun:
                return self._consume([*token_ids[index:]])
            self._reason(token_id)
        return self.error is None

    def rollback(self, num_tokens: int) -> None:
        """Take back the last `num_tokens` accepted tokens."""
        if num_tokens == 0:
            return
        token_ids = self._token_ids[:-num_tokens]
        # The library's own rollback is wrong for grammars with special tokens. To read the rest again takes a
        # microsecond a token.
        self._token_ids, self._tail = [], b""
        self.error, self.is_in_doubt, self._num_read_alone = None, False, None
        self._begin = None if self._reasoning is not None and self._reasoning.has_begun else 0
        self._matcher = self.grammar.matcher()
        self.accept(token_ids)

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
            self._fill_within_reasoning(row)
            return True
        if self._matcher.is_error():
            return self._fail()
        if not (self._ends_are_the_grammars and len(self._token_ids) >= self._min_tokens):
            self._gate(row)
        if self._may_open:
            self._opening.set(row)
        return self.error is None

    def forced_tokens(self) -> list[int]:
        """Tokens that the grammar allows nothing but: each is the only one that the mask at its place allows.
        [] where there is a choice."""
        if not self.has_begun or self._may_open or self.error is not None:
            return []
        return self._matcher.compute_ff_tokens()

    def num_allowed(self, draft: Tokens[int]) -> int:
        """How many tokens of a draft the grammar allows. Those of the reasoning are all counted."""
        if self.error is not None or not draft:
            return len(draft)
        num_free = 0
        if not self.has_begun or (self._may_open and draft[0] == self._reasoning.opening):
            if self._reasoning.closing not in draft:
                return len(draft)
            num_free = [*draft].index(self._reasoning.closing) + 1
        rest = [*draft[num_free:]]
        return num_free + (self._matcher.validate_tokens(rest) if rest else 0)

    @property
    def matcher(self) -> LLMatcher | None:
        """What writes the mask, for those that fill many rows at a time and then `complete` each. None: there
        is nothing to write."""
        return self._matcher if self.has_begun and self.error is None else None

    @property
    def _may_open(self) -> bool:
        """Whether the next token may begin the reasoning."""
        return self._opening is not None and not self._token_ids and self.has_begun

    def _reason(self, token_id: int) -> None:
        """Go on by a token within the reasoning."""
        tail = self._tail
        self._token_ids.append(token_id)
        self._tail = self._spellings.tail(tail, self.grammar.vocabulary.token_bytes(token_id))
        if token_id in self.end_token_ids:
            self.error = "the output ends within the reasoning"
        elif token_id in self._spellings.completed_by(tail):
            self.error = "the reasoning's closing tag is written in pieces"
        elif token_id == self._reasoning.closing:
            self._begin = len(self._token_ids)

    def _fill_within_reasoning(self, row: np.ndarray) -> None:
        row.fill(-1)
        self._ends.clear(row)
        if token_ids := self._spellings.completed_by(self._tail):
            _Bits(token_ids, self.num_words).clear(row)

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
