"""The control channel: messages on which workers act at once, and not only at their next heartbeat.

Any client can publish there, and a message may get lost: a key always holds the same information.
"""

import msgpack

COMMANDS = frozenset({"released", "pause", "resume", "drain"})
"""Commands for a whole queue. The only other command is `cancel`, which has a `job_id`."""
MAX_NUDGE_BYTES = 1024
"""Workers ignore longer messages."""


def nudge(command: str, **fields: str) -> bytes:
    """Encode a message for the channel, as msgpack."""
    return msgpack.packb({"command": command, **fields})
