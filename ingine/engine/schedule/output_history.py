"""The latest outputs of an engine by tenant, as a source of drafts for `suffix_drafter`."""

from array import array

from ingine.engine.schedule.indexed_text import IndexedText

END_OF_OUTPUT = -1
"""Follows each output in the history. No token has this id."""

MIN_OUTPUT_TOKENS = 3
"""The fewest tokens of an output that is kept: a shorter one has no pair that a token follows."""


class OutputHistory:
    """Keeps at most `max_tokens` tokens of all tenants together, ends of outputs included.

    There are two generations. When the young one holds half of `max_tokens`, the old one is dropped and the
    young one becomes old. So the oldest outputs go first, and dropping them costs nothing.
    """

    def __init__(self, max_tokens: int, *, across_tenants: bool = False):
        """across_tenants: share all outputs among all tenants."""
        self._max_young_tokens = max_tokens // 2
        self._across_tenants = across_tenants
        self._young: dict[str, IndexedText] = {}
        self._old: dict[str, IndexedText] = {}
        self._num_young_tokens = 0

    def add(self, tenant: str, token_ids: list[int]) -> None:
        """Add an output. If it is too long for a generation, only its end is kept."""
        num_tokens = min(len(token_ids) + 1, self._max_young_tokens)
        if num_tokens <= MIN_OUTPUT_TOKENS:
            return
        if self._num_young_tokens + num_tokens > self._max_young_tokens:
            self._young, self._old = {}, self._young
            self._num_young_tokens = 0
        text = self._young.setdefault(self._owner(tenant), IndexedText(array("i")))
        text.token_ids.extend(token_ids[1 - num_tokens :])
        text.token_ids.append(END_OF_OUTPUT)
        text.index()
        self._num_young_tokens += num_tokens

    def texts(self, tenant: str) -> list[IndexedText]:
        """The outputs from which sequences of `tenant` may be drafted, the more recent first."""
        owner = self._owner(tenant)
        return [texts[owner] for texts in (self._young, self._old) if owner in texts]

    def _owner(self, tenant: str) -> str:
        return "" if self._across_tenants else tenant
