"""Guesses how a sequence goes on: as it did when its last tokens came before."""

MEMORY = 0.9
"""How much of the acceptance rate's weight is left after each guess: some ten guesses count."""


class Drafter:
    """Prompt lookup (Saxena 2023; vLLM's "ngram") in one sequence's prompt and output.

    `token_ids` is the sequence's own list, which grows. The cost is constant a token, and of a guess that
    is not used too: the tokens that come tell how good it was, so the rate is known before a draft is paid.
    """

    def __init__(self, token_ids: list[int]):
        self._token_ids = token_ids
        self._num_seen = 0
        # Two tokens, and where what followed them last begins. Longer n-grams bring nothing: a match that
        # holds is followed anyway, and one by chance is found out by the next token.
        self._continuations: dict[tuple[int, int], int] = {}
        self._source: int | None = None
        """Token `_source` + i is the guess for token `_num_seen` + i."""
        self._num_guessed, self._num_right = 1.0, 0.5  # an unknown sequence is worth a try

    @property
    def acceptance_rate(self) -> float:
        """The share of guessed tokens that were right, of late; 0 to 1."""
        return self._num_right / self._num_guessed

    def catch_up(self) -> None:
        """Take notice of the tokens that have come since the last call, and look for the next guess."""
        num_tokens = len(self._token_ids)
        was_right = self._check_guess(num_tokens)
        for end in range(max(2, self._num_seen), num_tokens):
            self._continuations[self._token_ids[end - 2], self._token_ids[end - 1]] = end
        if was_right:  # then the match is longer now, and better than any that could be looked up
            self._source += num_tokens - self._num_seen
        else:
            self._source = self._continuations.get(tuple(self._token_ids[-2:]))
        self._num_seen = num_tokens

    def draft(self, max_tokens: int, min_probability: float = 0.0) -> list[int]:
        """At most `max_tokens` tokens that may follow; none where nothing came before.

        The j-th is right, with all before it, with probability acceptance_rate^j, which is to be at least
        `min_probability`. A source that reaches the end goes on with the draft itself, as in LZ77: a period
        repeats.
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
        """Whether all of the new tokens were as guessed."""
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
