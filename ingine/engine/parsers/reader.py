"""The text that a parser reads, which comes piece by piece.

A parser is a generator. It yields where it has to wait for more text, and is resumed with the next piece, so
it reads as if the whole text were there. What it does depends on the text alone, not on the pieces: it never
asks how much has come.
"""

import re
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import TypeVar

Result = TypeVar("Result")
Parsing = Generator[None, None, Result]
"""A part of a parser: it yields to wait for text, and returns what it has found."""

SPACE = re.compile(r"[ \t\r\n]*")


class Reader:
    """Text that has come and is not yet read. Nothing that was taken is ever looked at again."""

    def __init__(self):
        self._text = ""
        self._at = 0
        self._ended = False
        self._record: list[str] | None = None

    def push(self, text: str) -> None:
        self._text = self._text[self._at :] + text
        self._at = 0

    def end(self) -> None:
        """No more text comes."""
        self._ended = True

    # ------------------------------------------------------------------------------- reading

    def take(self, num_chars: int) -> str:
        """Characters that have come: those that were looked at before."""
        taken = self._text[self._at : self._at + num_chars]
        self._at += len(taken)
        if self._record is not None:
            self._record.append(taken)
        return taken

    def run(self, pattern: re.Pattern[str]) -> str:
        """Take what has come of a run of characters, which may go on. `pattern` may match nothing."""
        return self.take(pattern.match(self._text, self._at).end() - self._at)

    def look(self, num_chars: int) -> Parsing[str]:
        """The next characters, which stay. Fewer only where the text ends."""
        while len(self._text) - self._at < num_chars and not self._ended:
            yield
        return self._text[self._at : self._at + num_chars]

    def whole(self, pattern: re.Pattern[str]) -> Parsing[str]:
        """Take a run of characters to its end."""
        pieces = []
        while True:
            pieces.append(self.run(pattern))
            if self._at < len(self._text) or self._ended:
                return "".join(pieces)
            yield

    def skip_space(self) -> Parsing[None]:
        yield from self.whole(SPACE)

    def starts_with(self, text: str) -> Parsing[bool]:
        """Whether `text` comes next. Waits no longer than what has come agrees with it."""
        while True:
            come = self._text[self._at : self._at + len(text)]
            if come == text:
                return True
            if self._ended or not text.startswith(come):
                return False
            yield

    def accept(self, text: str) -> Parsing[bool]:
        """Take `text` if it comes next."""
        if not (yield from self.starts_with(text)):
            return False
        self.take(len(text))
        return True

    def until(self, markers: tuple[str, ...], emit: Callable[[str], None]) -> Parsing[str]:
        """Emit the text up to the first of `markers`. Returns that, which stays; "" where the text ends.

        Of two markers one may be within the other only if both end together.
        """
        search, first_chars = _search(markers)
        longest = max(map(len, markers))
        while True:
            if found := search(self._text, self._at):
                emit(self.take(found.start() - self._at))
                return found[0]
            if self._ended:
                emit(self.take(len(self._text) - self._at))
                return ""
            start = max(self._at, len(self._text) - longest + 1)
            emit(self.take(_beginning(self._text, start, markers, first_chars) - self._at))
            yield

    def rest(self, emit: Callable[[str], None]) -> Parsing[None]:
        """Emit all the text that there is and comes."""
        while True:
            emit(self.take(len(self._text) - self._at))
            if self._ended:
                return
            yield

    # ----------------------------------------------------------------------------- recording

    def record(self) -> None:
        """Keep what is taken from here on, for the case that it turns out not to be what it looks like."""
        self._record = []

    def forget(self) -> None:
        """What was recorded is what it looks like. Nothing is recorded any more."""
        self._record = None

    def recorded(self) -> str:
        """All that was taken since `record`, unless it is forgotten. Ends the recording."""
        record, self._record = self._record or (), None
        return "".join(record)


@lru_cache
def _search(markers: tuple[str, ...]) -> tuple[Callable, frozenset[str]]:
    pattern = re.compile("|".join(map(re.escape, sorted(markers, key=len, reverse=True))))
    return pattern.search, frozenset(marker[0] for marker in markers)


def _beginning(text: str, start: int, markers: tuple[str, ...], first_chars: frozenset[str]) -> int:
    """Where, from `start`, the end of `text` may begin a marker; its length if nowhere."""
    for at in range(start, len(text)):
        if text[at] in first_chars and any(marker.startswith(text[at:]) for marker in markers):
            return at
    return len(text)
