"""Finds stop strings in a stream of text, and holds back text that may be the start of one."""

from array import array


class StopStrings:
    """Finds the stop string that is complete first, as if the text came one character at a time.

    Neither the result nor the text returned so far depends on how the text was split. Each character is
    examined once for each stop string, however long these are.
    """

    def __init__(self, stops: tuple[str, ...], *, is_included: bool = False):
        """is_included: the text ends behind the stop string, so none of it is held back."""
        self._matches = [_Match(stop) for stop in stops]
        self._is_included = is_included
        self._held = ""
        self.num_doubtful = 0
        """Characters at the end of the returned text that are a stop string, or may be the start of one."""

    def append(self, text: str) -> tuple[str, str | None]:
        """Take the next text. Returns the text now certain, and the stop string that ended it or None."""
        if not self._matches:
            return text, None
        pending = self._held + text
        ends = [
            (end, -len(match.stop), match.stop)
            for match in self._matches
            if (end := match.advance(text)) is not None
        ]
        if ends:
            end, _, stop = min(ends)  # the first to end; of those, the longest
            self.num_doubtful = len(stop) if self._is_included else 0
            num_chars = len(self._held) + end - (0 if self._is_included else len(stop))
            self._held = ""
            return pending[:num_chars], stop
        longest = max(match.length for match in self._matches)
        if self._is_included:
            self.num_doubtful = longest
            return text, None
        num_certain = len(pending) - longest
        self._held = pending[num_certain:]
        return pending[:num_certain], None

    def flush(self) -> str:
        """Return the text that is held back, once no more text comes."""
        held, self._held = self._held, ""
        return held


class _Match:
    """The state of the search for one stop string (Knuth, Morris, Pratt 1977)."""

    __slots__ = ("_borders", "length", "stop")

    def __init__(self, stop: str):
        self.stop = stop
        self.length = 0
        """The length of the longest suffix of the text that is a proper prefix of `stop`."""
        self._borders = _borders(stop)

    def advance(self, text: str) -> int | None:
        """Take the next text. Returns where in it `stop` is first complete, or None if it is not."""
        stop, borders, length = self.stop, self._borders, self.length
        for index, char in enumerate(text, start=1):
            while length and stop[length] != char:
                length = borders[length - 1]
            if stop[length] == char:
                length += 1
            if length == len(stop):
                self.length = 0
                return index
        self.length = length
        return None


def _borders(stop: str) -> array:
    """Return, for each prefix of `stop`, the length of its longest proper prefix that is also its suffix."""
    borders, length = array("H", [0]), 0
    for char in stop[1:]:
        while length and stop[length] != char:
            length = borders[length - 1]
        if stop[length] == char:
            length += 1
        borders.append(length)
    return borders
