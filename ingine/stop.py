"""Stop strings in a stream of text: what may start one is held back until it is sure."""


class StopStrings:
    """Finds the stop string that is complete first, as if the text came one character at a time.

    So neither the cut nor the text emitted by then depends on how the text was split.
    """

    def __init__(self, stops: tuple[str, ...]):
        self._stops = stops
        self._held = ""

    def append(self, text: str) -> tuple[str, str | None]:
        """The text that is now sure, and the stop string that ended it, if one did."""
        if not self._stops:
            return text, None
        pending = self._held + text
        matches = [
            (start + len(stop), start, stop) for stop in self._stops if (start := pending.find(stop)) >= 0
        ]
        if matches:
            _, start, stop = min(matches)  # the first to end; of those, the longest
            self._held = ""
            return pending[:start], stop
        num_sure = len(pending) - max(_overlap(pending, stop) for stop in self._stops)
        self._held = pending[num_sure:]
        return pending[:num_sure], None

    def flush(self) -> str:
        """What is held back, when nothing more comes."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
