"""Starting a program that never outlives us, however we end."""

import ctypes
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

# A watcher keeps the read end of a pipe whose write end only the parent has, while the shell becomes the
# program (so the parent's child is the program itself). End of file means that the parent is gone, even by
# `kill -9`; a line, that the program is, and that its pid may be someone else's by now. Unlike
# PR_SET_PDEATHSIG this works on macOS too, and does not fire when merely the starting thread ends. It drops
# the program's output: what depends on that (a lock, a reader's end of file) must not wait for the watcher.
_ENDS_WITH_PARENT = """
exec 3<&0 </dev/null
(read -r _ <&3 || kill -TERM $$) >/dev/null 2>&1 &
exec "$@" 3<&-
"""

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Be killed with the process that started this one, whatever is going on here. Linux only.

    For a program that reads an end of file as well: it may be in code that lets it read nothing.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Child:
    """A program in its own session, which the terminal's Ctrl-C does not reach.

    It gets SIGTERM on `stop()`, or as soon as the process that started it is gone.
    """

    def __init__(
        self, command: Sequence[str], *, output: IO, env: Mapping[str, str] | None = None, umask: int = -1
    ):
        """`output` takes stdout and stderr; the caller may close it afterwards. `umask` -1: as ours."""
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
        """`kill -9`, and wait for the end."""
        self._popen.kill()
        self._popen.wait()

    def terminate(self, timeout_s: float = 60.0) -> int:
        """SIGTERM, and wait for the end. Its exit status; subprocess.TimeoutExpired if it does not end."""
        self._popen.terminate()
        return self._popen.wait(timeout_s)

    def stop(self, timeout_s: float = 10.0) -> None:
        """SIGTERM, and wait for the end; SIGKILL after `timeout_s`. Safe to call twice, and after `kill`."""
        pipe = self._popen.stdin
        with suppress(BrokenPipeError):
            if not self.running and not pipe.closed:
                pipe.write(b"\n")
            pipe.close()
        try:
            self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()
