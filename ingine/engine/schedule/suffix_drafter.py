"""Guesses how a sequence goes on: as its prompt, its output or recent outputs did after the same tokens."""

from collections.abc import Sequence as Tokens

from ingine.engine.schedule.drafter import MEMORY
from ingine.engine.schedule.indexed_text import MAX_MATCH, IndexedText
from ingine.engine.schedule.output_history import END_OF_OUTPUT, OutputHistory


class SuffixDrafter:
    """Speculation by suffix (SuffixDecoding, Oliaro et al. 2024; vLLM's "suffix").

    Of the places where the last two tokens came before, those count that have the longest match with what
    precedes them. All of these are followed as long as any is right, and at each token the majority is the
    guess: a branch of a tree of suffixes, of which nothing is built but what is walked.

    As with `ingine.engine.schedule.drafter.Drafter`, guesses are judged whether or not they are used.
    """

    def __init__(self, token_ids: list[int], tenant: str, outputs: OutputHistory):
        """`token_ids` is the sequence's own list, which grows."""
        self._token_ids = token_ids
        self._tenant = tenant
        self._outputs = outputs
        self._text = IndexedText(token_ids)
        self._num_seen = 0
        self._sources: list[tuple[Tokens[int], int]] = []
        """Texts, and the position in each that may be the next token's: the more recent first."""
        self._num_guessed, self._num_right = 1.0, 0.5  # an unknown sequence is worth a try

    @property
    def acceptance_rate(self) -> float:
        """The share of guessed tokens that were right, of late; 0 to 1."""
        return self._num_right / self._num_guessed

    def catch_up(self) -> None:
        """Take notice of the tokens that have come since the last call, and look for the next guess."""
        num_tokens = len(self._token_ids)
        for index in range(self._num_seen, num_tokens):
            if not self._sources:
                break
            self._follow(self._token_ids[index])
        self._num_seen = num_tokens
        self._text.index()
        if not self._sources and num_tokens >= 2:
            self._sources = self._longest_matches()

    def draft(self, max_tokens: int, min_probability: float = 0.0) -> list[int]:
        """At most `max_tokens` tokens that may follow.

        The probability that one is right, and all before it, is estimated as the product, over these, of
        acceptance rate and share of sources that agree; it is to be at least `min_probability`.

        A source that reaches the end of the sequence goes on with the draft itself: a period repeats.
        """
        draft: list[int] = []
        sources, probability, rate = self._sources, 1.0, self.acceptance_rate
        while sources and len(draft) < max_tokens:
            followers = [self._at(tokens, position, draft) for tokens, position in sources]
            guess = _majority(followers)
            probability *= rate * followers.count(guess) / len(followers)
            if guess == END_OF_OUTPUT or probability < min_probability:
                break
            draft.append(guess)
            sources = [
                (tokens, position + 1)
                for (tokens, position), follower in zip(sources, followers, strict=True)
                if follower == guess
            ]
        return draft

    def _at(self, tokens: Tokens[int], position: int, draft: list[int]) -> int:
        if tokens is self._token_ids and position >= self._num_seen:
            return draft[position - self._num_seen]
        return tokens[position]

    def _follow(self, token_id: int) -> None:
        """Judge the guess by the token that came, and keep the sources that have it."""
        followers = [tokens[position] for tokens, position in self._sources]
        guess = _majority(followers)
        if guess != END_OF_OUTPUT:
            self._num_guessed = MEMORY * self._num_guessed + 1
            self._num_right = MEMORY * self._num_right + (guess == token_id)
        self._sources = [
            (tokens, position + 1) for tokens, position in self._sources if tokens[position] == token_id
        ]

    def _longest_matches(self) -> list[tuple[Tokens[int], int]]:
        suffix = self._token_ids[-MAX_MATCH:]
        longest, sources = 0, []
        for text in (self._text, *self._outputs.texts(self._tenant)):
            for position, length in text.matches(suffix):
                if length > longest:
                    longest, sources = length, []
                if length == longest:
                    sources.append((text.token_ids, position))
        return sources


def _majority(token_ids: list[int]) -> int:
    """The most frequent one; of several, the first."""
    return token_ids[0] if len(token_ids) == 1 else max(token_ids, key=token_ids.count)
