"""Text from elsewhere on a terminal: control characters are shown, not obeyed."""

import logging
import re
import sys

_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 but for tab and newline, DEL, C1, what separates lines elsewhere, what turns the direction of writing,
and halves of characters. Looked at one by one, so it does not matter how a sequence was cut into pieces."""
_CONTROL_OR_BREAK = re.compile(f"[\t\n{_CONTROL.pattern[1:]}")


def visible(text: str, *, keep_lines: bool = False) -> str:
    """`text` with each control character as its escape, as \\x1b. `keep_lines`: newlines and tabs stay."""
    return (_CONTROL if keep_lines else _CONTROL_OR_BREAK).sub(_escaped, text)


def echo(text: object = "", *, err: bool = False, end: str = "\n", keep_lines: bool = False) -> None:
    """Print for a person or a program: on a terminal as `visible` has it, elsewhere as it is.

    By default it is one line, whatever is in it.
    """
    stream = sys.stderr if err else sys.stdout
    said = str(text)
    stream.write((visible(said, keep_lines=keep_lines) if stream.isatty() else said) + end)
    stream.flush()


class EchoHandler(logging.Handler):
    """Log messages for a person, as `echo` prints them, on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        echo(self.format(record), err=True, keep_lines=record.exc_info is not None)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    known = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(match[0])
    return known or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
