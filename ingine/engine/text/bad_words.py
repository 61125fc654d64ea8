"""Tokenises the words of `SamplingParams.bad_words`."""

from collections.abc import Iterable

from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import ErrorCode, InvalidRequest


def encode_bad_words(tokenizer: Tokenizer, words: Iterable[str]) -> list[list[int]]:
    """Return the token ids of each word, as it begins a text and as it follows a space.

    vLLM drops the second spelling if it has another number of tokens, and then still generates the word after
    a space. Here it is dropped only where the first one covers it: where it is a token of its own, and then
    the first. Raises InvalidRequest for a word without tokens.
    """
    spellings = []
    for word in words:
        first = tokenizer.encode_word(word.lstrip())
        if not first:
            raise InvalidRequest(
                ErrorCode.INVALID_PARAMETER, "bad_words: a word has no tokens in this model's vocabulary"
            )
        spellings.append(first)
        after_space = tokenizer.encode_word(" " + word.lstrip())
        if after_space[-len(first) :] != first:
            spellings.append(after_space)
    return spellings
