"""fakeredis, put right where it does otherwise than servers."""

from functools import wraps
from typing import Any

from fakeredis.model import StreamGroup


def list_idle_from_the_first_ms_on() -> None:
    """XPENDING's IDLE leaves out entries that have been idle for exactly so long: with 0 those that were
    delivered in this millisecond. A server lists them."""
    pending = StreamGroup.pending

    @wraps(pending)
    def pending_at_least(group: StreamGroup, idle: int | None, *args: Any) -> list:
        return pending(group, None if idle is None else idle - 1, *args)

    StreamGroup.pending = pending_at_least
