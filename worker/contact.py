"""Records when a partition's server answered, and after how long a silence."""

import time
from collections import deque

REMEMBERED_S = 60.0
"""How long a silence is remembered after it has ended."""
MIN_SILENCE_S = 0.25
"""Shorter silences are not recorded."""


class Contact:
    def __init__(self) -> None:
        self._last = time.monotonic()
        self._returns: deque[tuple[float, float]] = deque()
        """(when a silence ended by `time.monotonic`, its length in seconds), the oldest first."""

    def made(self, *, waited_s: float = 0.0) -> None:
        """Record an answer. `waited_s`: how long the server was asked to wait, which is no silence."""
        now = time.monotonic()
        if (silence_s := now - self._last - waited_s) >= MIN_SILENCE_S:
            self._returns.append((now, silence_s))
        self._last = now
        while self._returns and self._returns[0][0] < now - REMEMBERED_S:
            self._returns.popleft()

    def returned(self, *, after_s: float, within_s: float) -> bool:
        """Whether a silence of at least `after_s` has ended within the last `within_s`."""
        since = time.monotonic() - within_s
        return any(at >= since and silence_s >= after_s for at, silence_s in self._returns)
