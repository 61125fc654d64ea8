"""When a partition's server answered us, and after what silence."""

import time
from collections import deque

REMEMBERED_S = 60.0
NOTEWORTHY_S = 0.25


class Contact:
    def __init__(self) -> None:
        self._last = time.monotonic()
        self._returns: deque[tuple[float, float]] = deque()

    def made(self, *, waited_s: float = 0.0) -> None:
        """The server has answered, after it was asked to wait for `waited_s`: that is no silence."""
        now = time.monotonic()
        if (silence_s := now - self._last - waited_s) >= NOTEWORTHY_S:
            self._returns.append((now, silence_s))
        self._last = now
        while self._returns and self._returns[0][0] < now - REMEMBERED_S:
            self._returns.popleft()

    def returned(self, *, after_s: float, within_s: float) -> bool:
        """Whether it has come back within the last `within_s`, from a silence of at least `after_s`."""
        since = time.monotonic() - within_s
        return any(at >= since and silence_s >= after_s for at, silence_s in self._returns)
