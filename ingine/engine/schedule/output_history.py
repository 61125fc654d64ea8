"""The latest outputs of an engine, by whose they are, to draft from: see `suffix_drafter`."""

from array import array

from ingine.engine.schedule.indexed_text import IndexedText

END_OF_OUTPUT = -1
"""Stands after each output, and equals no token."""

MIN_OUTPUT_TOKENS = 3
"""A shorter one has no pair that something follows."""


class OutputHistory:
    """At most `max_tokens` tokens of all tenants together, ends of outputs included.

    Two generations: when the young one is half of all, the old one is forgotten and the young one is old. So
    the oldest go first, and to forget costs nothing.
    """

    def __init__(self, max_tokens: int, *, across_tenants: bool = False):
        """across_tenants: all outputs are everybody's."""
        self._max_young_tokens = max_tokens // 2
        self._across_tenants = across_tenants
        self._young: dict[str, IndexedText] = {}
        self._old: dict[str, IndexedText] = {}
        self._num_young_tokens = 0

    def add(self, tenant: str, token_ids: list[int]) -> None:
        """Of an output that is too long for a generation only the end is kept."""
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
        """The outputs that `tenant` may be drafted from, the more recent first."""
        owner = self._owner(tenant)
        return [texts[owner] for texts in (self._young, self._old) if owner in texts]

    def _owner(self, tenant: str) -> str:
        return "" if self._across_tenants else tenant
