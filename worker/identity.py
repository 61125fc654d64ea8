"""A worker's name, which it keeps, and its id on the wire, which is new with each start.

If a restarted worker kept its id, a job that had killed it would look like one that it runs, and the death
would never be counted.
"""

import os
import socket
import uuid


def default_name() -> str:
    """The host's name and the process id, as `host-pid`."""
    host = "".join(c if c.isalnum() or c in "-." else "-" for c in socket.gethostname())[:64]
    return f"{host}-{os.getpid()}"


def new_worker_id(name: str) -> str:
    """`name`, a hyphen and eight random hexadecimal digits."""
    return f"{name}-{uuid.uuid4().hex[:8]}"


def name_of(worker_id: str) -> str:
    """The name in an id of `new_worker_id`."""
    return worker_id.rpartition("-")[0]
