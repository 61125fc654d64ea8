"""An index of where each pair of tokens occurs in a growing list of tokens."""

from array import array
from collections.abc import Iterator, MutableSequence

MAX_OCCURRENCES = 4
"""How many of a pair's most recent occurrences are examined. More were not better, and each costs time."""

MAX_MATCH = 8
"""The longest match in tokens. Longer ones are not better."""


class IndexedText:
    """Indexes token pairs by hash chains, like zlib's LZ77: a token costs a dict and an array entry."""

    def __init__(self, token_ids: MutableSequence[int]):
        """`token_ids` belongs to the caller, which only appends to it and calls `index` afterwards."""
        self.token_ids = token_ids
        self._last: dict[tuple[int, int], int] = {}
        """For each pair, the position after its last occurrence that a token followed."""
        self._previous = array("i", (0, 0))
        """For each position, the previous position that follows the same pair; 0 if there is none."""

    def index(self) -> None:
        """Index the tokens that have been appended since the last call."""
        token_ids, last, append = self.token_ids, self._last, self._previous.append
        for position in range(len(self._previous), len(token_ids)):
            pair = token_ids[position - 2], token_ids[position - 1]
            append(last.get(pair, 0))
            last[pair] = position

    def matches(self, suffix: list[int]) -> Iterator[tuple[int, int]]:
        """Yield (position, length) for each place where the last `length` tokens of `suffix` precede
        `position` in the text, the most recent first. `length` is 2 to `MAX_MATCH`.

        suffix: the last tokens of this text or another, 2 to `MAX_MATCH` of them.
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
