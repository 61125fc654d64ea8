"""Keys of a terminal: reads them one by one, without waiting for Enter and without showing them."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_NAMES = {
    "\x1b": "escape",
    "\t": "tab",
    "\x1b[A": "up",
    "\x1bOA": "up",
    "\x1b[B": "down",
    "\x1bOB": "down",
    "\x1b[5~": "pageup",
    "\x1b[6~": "pagedown",
}
_KEY = re.compile(r"\x1b\[[0-9;]*[A-Za-z~]|\x1bO[A-Z]|.", re.DOTALL)
"""An escape sequence as terminals send it for a key, or one character."""


def decode_keys(sent: bytes) -> list[str]:
    """The keys in what a terminal has sent: `up`, `down`, `pageup`, `pagedown`, `tab`, `escape`
    or a character.

    Keys that are none of these are left out, whole escape sequences too.
    """
    keys = _KEY.findall(sent.decode(errors="replace"))
    return [_NAMES.get(key, key) for key in keys if key in _NAMES or key.isprintable()]


@contextmanager
def single_keys() -> Iterator[int | None]:
    """Have the terminal send each key at once. Yields the file to read, or None without a terminal.

    Ctrl-C still interrupts. Ctrl-Z does not stop the process, which would leave the screen to the shell.
    """
    try:
        import termios
        import tty
    except ImportError:  # not on this system
        yield None
        return
    if not sys.stdin.isatty():
        yield None
        return
    file = sys.stdin.fileno()
    before = termios.tcgetattr(file)
    try:
        tty.setcbreak(file)
        attributes = termios.tcgetattr(file)
        attributes[6][termios.VSUSP] = os.fpathconf(file, "PC_VDISABLE").to_bytes(1, "little")
        termios.tcsetattr(file, termios.TCSADRAIN, attributes)
        yield file
    finally:
        with suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(file, termios.TCSADRAIN, before)
