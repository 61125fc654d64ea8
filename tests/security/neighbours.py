"""Another user of this machine, for tests that can make files his or run programs as him."""

import os

from tests.paths import needs

NEIGHBOUR = 54_321
"""A user id that nobody has."""

needs_root = needs("another user's files (root)")


def become_the_neighbour() -> None:
    """In a process that root has started."""
    os.setgroups([])
    os.setgid(NEIGHBOUR)
    os.setuid(NEIGHBOUR)
