"""The most informative tests on Redis, if its `redis-server` is installed.

`make test-redis` runs the rest.
"""

import os
import shutil
import subprocess
import sys

import pytest

from tests.docs.tables import ROOT
from tests.servers import server_version

REDIS_SERVER = shutil.which("redis-server")
PARTS = {
    "every script": [
        *("tests/worker/test_scripts.py", "tests/contract/test_walks.py", "tests/producer/test_submit.py"),
        *("-k", "not fake"),
    ],
    "a server that is killed": ["tests/crash/test_crash.py", "-k", "a_server_killed_and_restarted"],
    "the access list": [
        *("tests/security/test_acl.py", "tests/security/test_roles.py"),
        *("-k", "each_role_can_do_its_work or test_roles"),
    ],
}


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.skipif(not REDIS_SERVER, reason="redis-server is not installed")
@pytest.mark.skipif("TEST_SERVER" in os.environ, reason="the tests run on another server as it is")
def test_on_redis_server(part):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *PARTS[part]]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["TEST_SERVER"] = REDIS_SERVER
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    print(*server_version(REDIS_SERVER), done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
