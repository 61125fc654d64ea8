"""The control channel: nudges that spare workers waiting for their next heartbeat.

Anybody can publish there and nothing has to arrive: what a nudge says is always in a key too.
"""

import msgpack

COMMANDS = frozenset({"released", "pause", "resume", "drain"})
"""What concerns a whole queue. There is `cancel` beside them, with a `job_id`."""
MAX_NUDGE_BYTES = 1024
"""A longer one is not read."""


def nudge(command: str, **fields: str) -> bytes:
    """A message for the channel, as msgpack."""
    return msgpack.packb({"command": command, **fields})
