"""Finds the tokens that would complete a forbidden word of a sequence, without a look at every word."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np


class BadWords:
    """Token sequences that an output must not contain. As in vLLM, the last token of each is forbidden where
    the output ends with the others.

    A lookup by the output's last token finds the few words that it may continue, so a step does not iterate
    over all words.
    """

    def __init__(self, words: Iterable[Sequence[int]]):
        """words: each of one token or more."""
        self.max_prefix_len = 0
        """The number of the last output tokens that decide what is forbidden."""
        single: dict[int, None] = {}
        self._after: defaultdict[int, list[tuple[list[int], int]]] = defaultdict(list)
        """The last token of a prefix -> prefixes and the token forbidden after each."""
        self._after_two: defaultdict[int | None, list[tuple[list[int], int, int]]] = defaultdict(list)
        """The last token but one of a prefix -> prefixes without their last token, that token, and the token
        forbidden after both. None: for prefixes of one token."""
        for *prefix, last in words:
            if not prefix:
                single[last] = None
                continue
            self.max_prefix_len = max(self.max_prefix_len, len(prefix))
            self._after[prefix[-1]].append((prefix, last))
            *before, pending = prefix
            self._after_two[before[-1] if before else None].append((before, pending, last))
        self._single = np.array(list(single), dtype=np.int64)

    def forbidden(self, output_tail: list[int]) -> np.ndarray:
        """Return the tokens [num_tokens] int64 that are forbidden after an output that ends with
        `output_tail`: at least its last `max_prefix_len` tokens, or all of it.
        """
        words = self._after.get(output_tail[-1]) if output_tail else None
        last = [last for prefix, last in words or () if output_tail[-len(prefix) :] == prefix]
        return np.concatenate((self._single, np.array(last, dtype=np.int64))) if last else self._single

    def forbidden_after_pending(self, output_tail: list[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return tokens [num_pairs] int64, and the tokens that are forbidden if one of them follows
        `output_tail`. Those that are forbidden whatever follows it are not among them, see `forbidden`.
        """
        words = self._after_two.get(None, [])
        if output_tail:
            longer = self._after_two.get(output_tail[-1], ())
            words = words + [word for word in longer if output_tail[-len(word[0]) :] == word[0]]
        pairs = np.array([(pending, last) for _, pending, last in words], dtype=np.int64).reshape(-1, 2)
        return pairs[:, 0], pairs[:, 1]

    @property
    def single(self) -> np.ndarray:
        """[num_words] int64: the words of one token, which are always forbidden."""
        return self._single
