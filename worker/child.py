"""Start a program that never outlives this process, however this process ends."""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

# A watcher reads from a pipe whose write end only the parent has, while the shell becomes the program (so
# the parent's child is the program itself). End of file means that the parent has ended, even by `kill -9`.
# A line means that the program has ended, and that another process may have its pid by now. Unlike
# PR_SET_PDEATHSIG this works on macOS too, and does not fire when merely the thread that started the program
# ends. The watcher closes the program's output: a lock on it, or its reader's end of file, must not depend on
# the watcher.
_ENDS_WITH_PARENT = """
exec 3<&0 </dev/null
(read -r _ <&3 || kill -TERM $$) >/dev/null 2>&1 &
exec "$@" 3<&-
"""

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Have the kernel kill this process when the one that started it ends. Does nothing but on Linux.

    Complements reading an end of file, since code that keeps the interpreter prevents any reading.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """A program in its own session, which the terminal's Ctrl-C does not reach.

    It gets SIGTERM on `stop()`, and as soon as the process that started it has ended.
    """

    def __init__(
        self, command: Sequence[str], *, output: IO, env: Mapping[str, str] | None = None, umask: int = -1
    ):
        """Start the program. `output` takes stdout and stderr; the caller may close it afterwards. `umask`
        -1: this process's own."""
        self._popen = subprocess.Popen(
            ["/bin/sh", "-c", _ENDS_WITH_PARENT, "sh", *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env=env,
            start_new_session=True,
            umask=umask,
        )
        self.pid = self._popen.pid

    @property
    def running(self) -> bool:
        return self._popen.poll() is None

    def kill(self) -> None:
        """Send SIGKILL, and wait for the end."""
        self._popen.kill()
        self._popen.wait()

    def terminate(self, timeout_s: float = 60.0) -> int:
        """Send SIGTERM, and wait for the end. Returns the exit status. Raises subprocess.TimeoutExpired."""
        self._popen.terminate()
        return self._popen.wait(timeout_s)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Send SIGTERM, and SIGKILL after `timeout_s`. Safe to call twice, and after `kill`."""
        pipe = self._popen.stdin
        with suppress(BrokenPipeError):
            if not self.running and not pipe.closed:
                pipe.write(b"\n")
            pipe.close()
        try:
            self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
