"""Stop strings in a stream of text: what may start one is held back until it is sure."""

from array import array


class StopStrings:
    """Finds the stop string that is complete first, as if the text came one character at a time.

    So neither the cut nor the text emitted by then depends on how the text was split. Each character is
    looked at once for each stop string, however long these are.
    """

    def __init__(self, stops: tuple[str, ...]):
        self._matches = [_Match(stop) for stop in stops]
        self._held = ""

    def append(self, text: str) -> tuple[str, str | None]:
        """The text that is now sure, and the stop string that ended it, if one did."""
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
            start = len(self._held) + end - len(stop)
            self._held = ""
            return pending[:start], stop
        num_sure = len(pending) - max(match.length for match in self._matches)
        self._held = pending[num_sure:]
        return pending[:num_sure], None

    def flush(self) -> str:
        """What is held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held


class _Match:
    """How much of one stop string the end of a text is, after each character (Knuth, Morris, Pratt 1977)."""

    __slots__ = ("_borders", "length", "stop")

    def __init__(self, stop: str):
        self.stop = stop
        self.length = 0
        """Of the longest end of the text that is a beginning of `stop`, and not all of it."""
        self._borders = _borders(stop)

    def advance(self, text: str) -> int | None:
        """Where in `text`, which comes next, the stop string first ends. None: nowhere."""
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
    """For each beginning of `stop` the length of the longest shorter one that it ends with."""
    borders, length = array("H", [0]), 0
    for char in stop[1:]:
        while length and stop[length] != char:
            length = borders[length - 1]
        if stop[length] == char:
            length += 1
        borders.append(length)
    return borders
