"""A growing text of tokens, and where each pair of tokens comes in it."""

from array import array
from collections.abc import Iterator, MutableSequence

MAX_OCCURRENCES = 4
"""The most recent ones of a pair that are looked at: more were not better, and each costs time."""

MAX_MATCH = 8
"""Tokens up to which one match is longer, and therefore better, than another."""


class IndexedText:
    """The hash chains of LZ77, as in zlib: a token costs one entry of a dict and one of an array."""

    def __init__(self, token_ids: MutableSequence[int]):
        """`token_ids` is the caller's, who only appends to it, and calls `index` then."""
        self.token_ids = token_ids
        self._last: dict[tuple[int, int], int] = {}
        """Where the token after a pair is, the last time that something followed that pair."""
        self._previous = array("i", (0, 0))
        """Of each position, the one before it that follows the same pair; 0: none."""

    def index(self) -> None:
        """Take in the tokens that have come since the last call."""
        token_ids, last, append = self.token_ids, self._last, self._previous.append
        for position in range(len(self._previous), len(token_ids)):
            pair = token_ids[position - 2], token_ids[position - 1]
            append(last.get(pair, 0))
            last[pair] = position

    def matches(self, suffix: list[int]) -> Iterator[tuple[int, int]]:
        """Positions at which the text goes on after the last tokens of `suffix`, the most recent first; with
        how many of these precede them there: 2 to `MAX_MATCH`.

        suffix: the last `MAX_MATCH` tokens of another text, or of this one; at least 2.
        """
        position = self._last.get((suffix[-2], suffix[-1]), 0)
        for _ in range(MAX_OCCURRENCES):
            if position == 0:
                return
            length, longest = 2, min(len(suffix), position)
            while length < longest and self.token_ids[position - 1 - length] == suffix[-1 - length]:
                length += 1
            yield position, length
            position = self._previous[position]
