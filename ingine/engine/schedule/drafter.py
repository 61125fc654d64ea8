"""Drafts tokens for a sequence by prompt lookup: what followed its last tokens the time before."""

MEMORY = 0.9
"""The factor by which each guess reduces the weight of earlier ones: the last ten or so count."""


class Drafter:
    """Prompt lookup (Saxena 2023; vLLM's "ngram") in one sequence's prompt and output.

    Each token costs constant time. Guesses are compared with the tokens that follow even if they are not
    drafted, so the acceptance rate is known before any draft is computed.
    """

    def __init__(self, token_ids: list[int]):
        """`token_ids` is the sequence's own list, which grows."""
        self._token_ids = token_ids
        self._num_seen = 0
        # Maps two tokens to the position after their last occurrence. Longer n-grams gain nothing: a correct
        # match is followed anyway, and the next token exposes a coincidental one.
        self._continuations: dict[tuple[int, int], int] = {}
        self._source: int | None = None
        """Token `_source` + i is the guess for token `_num_seen` + i."""
        self._num_guessed, self._num_right = 1.0, 0.5  # the rate of a sequence that is not known yet

    @property
    def acceptance_rate(self) -> float:
        """The share of recent guesses that were right, 0 to 1."""
        return self._num_right / self._num_guessed

    def catch_up(self) -> None:
        """Process the tokens that have been appended since the last call, and look for the next guess."""
        num_tokens = len(self._token_ids)
        was_right = self._check_guess(num_tokens)
        for end in range(max(2, self._num_seen), num_tokens):
            self._continuations[self._token_ids[end - 2], self._token_ids[end - 1]] = end
        if was_right:  # then the match is longer now, and better than any new one
            self._source += num_tokens - self._num_seen
        else:
            self._source = self._continuations.get(tuple(self._token_ids[-2:]))
        self._num_seen = num_tokens

    def draft(self, max_tokens: int, min_probability: float = 0.0) -> list[int]:
        """Return at most `max_tokens` tokens that may follow; none without an earlier occurrence.

        The j-th draft token and all before it are right with probability acceptance_rate^j. The draft ends
        where that falls below `min_probability`. A source that reaches the end of the sequence continues with
        the draft itself, as in LZ77, so a period repeats.
        """
        if self._source is None:
            return []
        period = self._num_seen - self._source
        draft: list[int] = []
        probability = rate = self.acceptance_rate
        while len(draft) < max_tokens and probability >= min_probability:
            draft.append(self._token_ids[self._source + len(draft) % period])
            probability *= rate
        return draft

    def _check_guess(self, num_tokens: int) -> bool:
        """Compare the new tokens with the guess. Returns whether all of them were as guessed."""
        if self._source is None or num_tokens == self._num_seen:
            return False
        num_right = 0
        for position in range(self._num_seen, num_tokens):
            if self._token_ids[position] != self._token_ids[self._source + num_right]:
                break
            num_right += 1
        was_right = num_right == num_tokens - self._num_seen
        self._num_guessed = MEMORY * self._num_guessed + num_right + (not was_right)
        self._num_right = MEMORY * self._num_right + num_right
        return was_right
