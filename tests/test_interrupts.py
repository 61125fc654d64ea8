"""The suite can be started in the background, by a script or with nohup."""

import signal
import subprocess
import sys

INTERRUPTS_ITSELF = "import os, signal; os.kill(os.getpid(), signal.SIGINT)"
IGNORES = f"""
import signal, subprocess, sys
from tests.interrupts import heed_interrupts
signal.signal(signal.SIGINT, signal.SIG_IGN)
heed_interrupts()
print(subprocess.run([sys.executable, "-c", {INTERRUPTS_ITSELF!r}]).returncode)
"""


def test_what_tests_start_can_be_interrupted_though_the_suite_ignores_it():
    ran = subprocess.run([sys.executable, "-c", IGNORES], capture_output=True, text=True, check=True)
    assert int(ran.stdout) == -signal.SIGINT
