"""Another user of this machine, for tests that can give files to that user or run programs as that user."""

import os

from tests.paths import needs

NEIGHBOUR = 54_321
"""A user id without a user."""

needs_root = needs("another user's files (root)")


def become_the_neighbour() -> None:
    """Become the neighbour, in a process that root has started."""
    os.setgroups([])
    os.setgid(NEIGHBOUR)
    os.setuid(NEIGHBOUR)
