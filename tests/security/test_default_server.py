"""Who names no server finds this user's embedded one whenever it starts, or reads where it was looked for."""

import os
import socket

import pytest

from ingine.local_server import other_person_on
from tests.security.neighbours import NEIGHBOUR, needs_root

# ------------------------------------------------------------------------------------------- whose


@needs_root
@pytest.mark.parametrize(
    ("host", "is_reached"),
    [("127.0.0.1", True), ("0.0.0.0", True), ("::", True), ("127.0.0.2", False), ("::1", False)],
)
def test_another_person_on_another_address_is_not_in_the_way(host, is_reached):
    os.seteuid(NEIGHBOUR)
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        his = socket.create_server((host, 0), family=family, dualstack_ipv6=host == "::")
    finally:
        os.seteuid(0)
    with his:
        assert other_person_on(his.getsockname()[1]) == (str(NEIGHBOUR) if is_reached else None)
