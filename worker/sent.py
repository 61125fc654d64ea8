"""Events that a worker has sent, kept so that they can be sent again if a server loses the end of a log."""

from collections import deque

from ingine.contract.calls.running import Append

KEPT_BYTES = 128 << 10
"""Size of the committed events that are kept for each job: several seconds of tokens, or about one second
with the most log probabilities. A server that crashes with its machine loses about a second of writes."""

OVERHEAD_BYTES = 250
"""Memory that an Append takes beside its event's bytes."""


class Sent:
    """The events of one attempt: all that are not committed, and the last `KEPT_BYTES` of those that are.

    The log has the others, so memory does not grow with a job's output: the engine computes no more than a
    few steps ahead of what is committed.
    """

    def __init__(self, start: int):
        """start: the position at which the attempt began."""
        self._appends: deque[Append] = deque()
        self._num_bytes = 0
        self.end = start
        """The position at which the next event begins."""

    def add(self, append: Append, committed: int) -> None:
        """Add the next event, which begins at `end`. `committed`: number of tokens in the log."""
        self._appends.append(append)
        self.end = append.position
        self._num_bytes += len(append.raw) + OVERHEAD_BYTES
        while self._num_bytes > KEPT_BYTES and self._appends[0].position <= committed:
            self._num_bytes -= len(self._appends.popleft().raw) + OVERHEAD_BYTES

    def after(self, position: int) -> Append | None:
        """The first event that ends after `position`; None if there is none."""
        # From the end, since `position` is mostly near it.
        following = None
        for append in reversed(self._appends):
            if append.position <= position:
                break
            following = append
        return following

    def all_after(self, position: int) -> list[Append]:
        """The events that end after `position`, in their order."""
        following = []
        for append in reversed(self._appends):
            if append.position <= position:
                break
            following.append(append)
        following.reverse()
        return following

    def goes_on_from(self, position: int) -> bool:
        """Whether the kept events continue a log that ends at `position`."""
        following = self.after(position)
        return following is not None and following.start == position

    def forget_after(self, position: int) -> None:
        """Drop the events that end after `position`, at which an event has ended."""
        while self._appends and self._appends[-1].position > position:
            self._num_bytes -= len(self._appends.pop().raw) + OVERHEAD_BYTES
        self.end = min(self.end, position)
