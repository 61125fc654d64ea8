"""A model's vocabulary as llguidance wants it."""

from collections.abc import Iterable

from llguidance import LLTokenizer

from ingine.engine.grammar.tag_spellings import TagSpellings
from ingine.engine.text.panics import panics_as_errors
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import ErrorCode, InvalidRequest


class GrammarVocabulary:
    """The bytes of every token, in a trie, and the tokens that end an output.

    Making one takes about a second and holds the interpreter's lock.
    """

    def __init__(self, tokenizer: Tokenizer, *, vocab_size: int, eos_token_ids: Iterable[int]):
        """vocab_size: columns of the model's logits. Those that the tokenizer has no token for are never
        allowed.

        Raises InvalidRequest for a tokenizer whose tokens have no bytes, or a model that has no
        end-of-sequence token among them: no output of such a model can be constrained.
        """
        self._num_tokens = num_tokens = tokenizer.num_tokens
        self.eos_token_ids = tuple(sorted(id for id in eos_token_ids if id < num_tokens))
        if not self.eos_token_ids:
            raise _unsupported("it has no end-of-sequence token")
        # Padded where the model has more rows than the tokenizer has tokens, which is usual; where it has
        # fewer, the mask has columns that no logit belongs to.
        self.vocab_size = max(vocab_size, num_tokens)
        self.num_words = -(-self.vocab_size // 32)
        """int32s of a mask."""
        self._spellings: dict[int, TagSpellings] = {}
        core, *_ = tokenizer.definition()
        try:
            with panics_as_errors():
                self.ll_tokenizer = LLTokenizer(
                    core, n_vocab=self.vocab_size, eos_token=[*self.eos_token_ids]
                )
        except (ValueError, RuntimeError) as error:
            raise _unsupported(f"its tokenizer has no bytes for its tokens ({error!s:.200})") from None
        # These are more than the tokenizer's own special tokens: `<tool_call>` is one for the library.
        self._special_names = [
            (token_id, name)
            for token_id, name in tokenizer.added_texts.items()
            if self.ll_tokenizer.is_special_token(token_id)
        ]

    def token_id(self, text: str) -> int | None:
        """Return the id of the token that is exactly `text`; None if that takes several."""
        token_ids = self.ll_tokenizer.tokenize_str(text, parse_special=True)
        is_one = len(token_ids) == 1 and self.token_bytes(token_ids[0]) == text.encode()
        return token_ids[0] if is_one else None

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token adds to a text that shows special tokens; b"" for an unknown id."""
        return self.ll_tokenizer.decode_bytes([token_id]) if token_id < self._num_tokens else b""

    def spellings(self, token_id: int) -> TagSpellings:
        """Return what else writes the tag that is this token. Made once for each tag."""
        if token_id not in self._spellings:
            texts = map(self.token_bytes, range(self._num_tokens))
            self._spellings[token_id] = TagSpellings(self.token_bytes(token_id), token_id, texts)
        return self._spellings[token_id]

    def names_special(self, text: str) -> bool:
        """Whether a grammar that contains `text` may force the name of a token that the library takes for
        special. A token that `text` also asks for by its id, `<[id]>`, does not count: nothing is forced.

        Where such a name is forced, the library allows the special token in its place, and then refuses it.
        """
        return any(name in text and f"<[{token_id}]>" not in text for token_id, name in self._special_names)

    def is_special(self, text: str) -> bool:
        """Whether `text` is the name of one special token."""
        token_ids = self.ll_tokenizer.tokenize_str(text, parse_special=True)
        return len(token_ids) == 1 and self.ll_tokenizer.is_special_token(token_ids[0])


def _unsupported(reason: str) -> InvalidRequest:
    return InvalidRequest(
        ErrorCode.INVALID_PARAMETER,
        f"structured_outputs: no output of this model can be constrained: {reason}",
    )
