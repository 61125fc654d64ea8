"""What a worker keeps of the events that it has sent, for a server that loses the end of a log."""

from collections import deque

from ingine.worker.entries import Append

KEPT_BYTES = 128 << 10
"""Of a job's committed events: several seconds of tokens, about one with the most log probabilities. A server
that crashes with its machine loses about a second of writes."""

OVERHEAD_BYTES = 250
"""What an Append takes beside its event's bytes."""


class Sent:
    """The events of one attempt: all that are not committed, and of those that are, the last `KEPT_BYTES`.

    The log has the others, and nothing here grows with a job's output. The engine computes no more than a few
    steps ahead of what is committed.
    """

    def __init__(self) -> None:
        self._appends: deque[Append] = deque()
        self._num_bytes = 0
        self.end = 0
        """Where the next one begins; 0 where there was none."""

    def add(self, append: Append, committed: int) -> None:
        """`append` comes next. `committed`: tokens that are in the log."""
        self._appends.append(append)
        self.end = append.position
        self._num_bytes += len(append.raw) + OVERHEAD_BYTES
        while self._num_bytes > KEPT_BYTES and self._appends[0].position <= committed:
            self._num_bytes -= len(self._appends.popleft().raw) + OVERHEAD_BYTES

    def after(self, position: int) -> Append | None:
        """The first that ends behind `position`, which is mostly near the end."""
        following = None
        for append in reversed(self._appends):
            if append.position <= position:
                break
            following = append
        return following

    def goes_on_from(self, position: int) -> bool:
        """Whether what a log lacks that ends at `position` is all here."""
        following = self.after(position)
        return following is not None and following.start == position

    def forget_after(self, position: int) -> None:
        while self._appends and self._appends[-1].position > position:
            self._num_bytes -= len(self._appends.pop().raw) + OVERHEAD_BYTES
        self.end = self._appends[-1].position if self._appends else 0
