"""Sparse token counts of a sequence, for its penalties: their cost depends on the distinct tokens alone."""

from collections.abc import Iterable

import numpy as np


class TokenCounts:
    """The distinct tokens of prompt and output, each with its number of occurrences in the output."""

    def __init__(self, prompt_token_ids: Iterable[int]):
        distinct = list(dict.fromkeys(prompt_token_ids))
        self._index = {token_id: index for index, token_id in enumerate(distinct)}
        self._token_ids = np.array(distinct, dtype=np.int64)
        self._counts = np.zeros(len(distinct), dtype=np.float32)

    def add(self, token_id: int) -> None:
        """Count one more output token."""
        index = self._index.get(token_id)
        if index is None:
            index = self._index[token_id] = len(self._index)
            if index == len(self._counts):
                room = np.zeros(index + 8, dtype=np.int64)  # doubling: amortised constant cost per token
                self._token_ids = np.concatenate((self._token_ids, room))
                self._counts = np.concatenate((self._counts, room.astype(np.float32)))
            self._token_ids[index] = token_id
        self._counts[index] += 1

    def copy(self) -> "TokenCounts":
        copy = TokenCounts(())
        copy._index, copy._token_ids, copy._counts = (
            self._index.copy(),
            self._token_ids.copy(),
            self._counts.copy(),
        )
        return copy

    @property
    def token_ids(self) -> np.ndarray:
        """[num_distinct] int64."""
        return self._token_ids[: len(self._index)]

    @property
    def counts(self) -> np.ndarray:
        """[num_distinct] float32: 0 for a token that occurs only in the prompt."""
        return self._counts[: len(self._index)]
