"""What a worker is called: its name, which it keeps, and its id on the wire, which is new with each start.

Were the id the same after a restart, a job that kills its worker would look like one that this worker runs,
and no death would ever be counted.
"""

import os
import socket
import uuid


def default_name() -> str:
    """Host and process."""
    host = "".join(c if c.isalnum() or c in "-." else "-" for c in socket.gethostname())[:64]
    return f"{host}-{os.getpid()}"


def new_worker_id(name: str) -> str:
    return f"{name}-{uuid.uuid4().hex[:8]}"


def name_of(worker_id: str) -> str:
    return worker_id.rpartition("-")[0]
