"""A terminal, as a pseudo-terminal, in which `ingine top` runs."""

import fcntl
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import threading
from contextlib import suppress
from typing import Self

from tests.waiting import HANGS_S, wait_until

ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
LAST_LINE = "q quit"
DECISIVE = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "COLORTERM", "TTY_COMPATIBLE", "TTY_INTERACTIVE")
"""Variables that change what is drawn: a test sets its own."""


class Screen:
    """Runs the command until the end of the `with` block."""

    def __init__(self, *arguments: str, width: int = 80, height: int = 24, **env: str):
        self._ours, self._theirs = os.openpty()
        self.resize(width, height)
        self.attributes = termios.tcgetattr(self._theirs)
        known = {name: value for name, value in os.environ.items() if name not in DECISIVE}
        self.program = subprocess.Popen(
            [sys.executable, "-m", "ingine", "top", *arguments],
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            env=known | {"TERM": "xterm", "PYTHONIOENCODING": "utf-8"} | env,
        )
        self.written = ""
        self._reader = threading.Thread(target=self._read)

    def __enter__(self) -> Self:
        self._reader.start()
        return self

    def __exit__(self, *_) -> None:
        self.program.kill()
        self.program.wait(HANGS_S)
        os.close(self._theirs)
        self._reader.join()
        os.close(self._ours)

    def resize(self, width: int, height: int) -> None:
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))

    def press(self, keys: str) -> None:
        os.write(self._ours, keys.encode())

    @property
    def lines(self) -> list[str]:
        """The last frame that was drawn whole."""
        for frame in reversed(self.written.split("\x1b[H")):
            if LAST_LINE in frame:
                return [line.rstrip() for line in ESCAPE.sub("", frame).splitlines()]
        return []

    def wait_for(self, text: str) -> None:
        """Wait until the last frame has this text."""
        wait_until(lambda: self._shows(text), what=f"{text!r} on the screen")

    def wait_without(self, text: str) -> None:
        wait_until(lambda: self.lines and not self._shows(text), what=f"a screen without {text!r}")

    def end(self, number: signal.Signals | None = None) -> int:
        """Send a signal, if any, and return the exit status. Checks that the terminal is as it was before."""
        if number:
            self.program.send_signal(number)
        status = self.program.wait(HANGS_S)
        assert termios.tcgetattr(self._theirs) == self.attributes
        wait_until(lambda: self.written.count("\x1b[?1049h") == self.written.count("\x1b[?1049l"))
        return status

    def _shows(self, text: str) -> bool:
        return any(text in line for line in self.lines)

    def _read(self) -> None:
        with suppress(OSError):  # EIO: the terminal is closed
            while part := os.read(self._ours, 65_536):
                self.written += part.decode(errors="replace")
