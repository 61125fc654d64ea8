"""Prints untrusted text on a terminal: control characters are shown as escapes."""

import logging
import re
import sys

_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""C0 except tab and newline, DEL, C1, Unicode's line separators, bidirectional controls, and surrogates. Each
is replaced on its own, so it does not matter how an escape sequence was split."""
_CONTROL_OR_BREAK = re.compile(f"[\t\n{_CONTROL.pattern[1:]}")


def visible(text: str, *, keep_lines: bool = False) -> str:
    """Replace each control character of `text` by an escape such as \\x1b. `keep_lines`: keep newlines and
    tabs.
    """
    return (_CONTROL if keep_lines else _CONTROL_OR_BREAK).sub(_escaped, text)


def echo(text: object = "", *, err: bool = False, end: str = "\n", keep_lines: bool = False) -> None:
    """Print text: on a terminal with control characters escaped as by `visible`, elsewhere unchanged.

    By default a terminal shows one line, whatever the text contains.
    """
    stream = sys.stderr if err else sys.stdout
    shown = str(text)
    stream.write((visible(shown, keep_lines=keep_lines) if stream.isatty() else shown) + end)
    stream.flush()


class EchoHandler(logging.Handler):
    """Prints log messages on standard error, as `echo` does."""

    def emit(self, record: logging.LogRecord) -> None:
        echo(self.format(record), err=True, keep_lines=record.exc_info is not None)


def _escaped(match: re.Match[str]) -> str:
    code = ord(match[0])
    known = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(match[0])
    return known or (f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}")
