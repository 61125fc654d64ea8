"""Drafts tokens for a sequence: what followed the same tokens in its prompt, its output or recent outputs."""

from collections.abc import Sequence as Tokens

from ingine.engine.schedule.drafter import MEMORY
from ingine.engine.schedule.indexed_text import MAX_MATCH, IndexedText
from ingine.engine.schedule.output_history import END_OF_OUTPUT, OutputHistory


class SuffixDrafter:
    """Suffix speculation (SuffixDecoding, Oliaro et al. 2024; vLLM's "suffix").

    The sources of a draft are the earlier occurrences of the last two tokens whose preceding tokens match
    the longest. All of them are followed as long as any is right, and the guess for each token is the
    majority's. This walks a branch of a suffix tree without building the tree.

    Like `ingine.engine.schedule.drafter.Drafter`, it judges guesses whether or not they are drafted.
    """

    def __init__(self, token_ids: list[int], tenant: str, outputs: OutputHistory):
        """`token_ids` is the sequence's own list, which grows."""
        self._token_ids = token_ids
        self._tenant = tenant
        self._outputs = outputs
        self._text = IndexedText(token_ids)
        self._num_seen = 0
        self._sources: list[tuple[Tokens[int], int]] = []
        """(text, position of the token that may come next), the more recent first."""
        self._num_guessed, self._num_right = 1.0, 0.5  # the rate of a sequence that is not known yet

    @property
    def acceptance_rate(self) -> float:
        """The share of recent guesses that were right, 0 to 1."""
        return self._num_right / self._num_guessed

    def catch_up(self) -> None:
        """Process the tokens that have been appended since the last call, and look for the next guess."""
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
        """Return at most `max_tokens` tokens that may follow.

        The probability that a draft token and all before it are right is estimated as the product of, for
        each of them, the acceptance rate and the share of sources that agree. The draft ends where it falls
        below `min_probability`. A source that reaches the end of the sequence continues with the draft
        itself, so a period repeats.
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
        """Compare the guess with the token that came, and keep the sources that have that token."""
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
    """The most frequent token; the first of several."""
    return token_ids[0] if len(token_ids) == 1 else max(token_ids, key=token_ids.count)
