"""Corrects fakeredis where it differs from servers."""

from functools import wraps
from typing import Any

from fakeredis.model import StreamGroup


def list_idle_from_the_first_ms_on() -> None:
    """Make XPENDING's IDLE include entries that have been idle for exactly that long, as servers do.

    fakeredis leaves them out: with IDLE 0, those that were delivered in this millisecond."""
    pending = StreamGroup.pending

    @wraps(pending)
    def pending_at_least(group: StreamGroup, idle: int | None, *args: Any) -> list:
        return pending(group, None if idle is None else idle - 1, *args)

    StreamGroup.pending = pending_at_least
