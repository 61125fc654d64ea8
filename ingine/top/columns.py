"""Text in columns: cut and padded to a number of terminal cells, without control characters."""

from collections.abc import Sequence
from dataclasses import dataclass

from rich.cells import cell_len, set_cell_size

from ingine.terminal import visible


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    width: int
    """In cells. A negative width aligns to the right."""


def row(columns: Sequence[Column], cells: Sequence[str]) -> str:
    """One line: each text in its column, with a space between two."""
    return " ".join(cell(text, column.width) for column, text in zip(columns, cells, strict=True))


def heading(columns: Sequence[Column]) -> str:
    return row(columns, [column.title for column in columns])


def cell(text: str, width: int) -> str:
    """Cut or pad `text` to abs(width) cells, and escape control characters. A negative width aligns right."""
    size = abs(width)
    shown = shorten(visible(text), size)
    padding = " " * (size - cell_len(shown))
    return padding + shown if width < 0 else shown + padding


def shorten(text: str, width: int) -> str:
    """Cut `text`, with an ellipsis, if it has more than `width` cells."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1).rstrip() + "…" if width > 1 else set_cell_size(text, width)


def last_lines(text: str, width: int, num_lines: int) -> list[str]:
    """The end of `text` in at most `num_lines` lines of `width` cells, its white space joined."""
    text = visible(" ".join(text.split()))
    lines = [""]
    for character in text[-width * num_lines :]:
        if cell_len(lines[-1] + character) > width:
            lines.append("")
        lines[-1] += character
    return lines[-num_lines:]


def duration(seconds: float) -> str:
    """A short time: `0.25 s`, `2.3 s`, `42 s`, `4 min`, `3 h`."""
    if seconds < 1:
        return f"{seconds:.2f} s"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.0f} h"


def size(num_bytes: float) -> str:
    """A number of bytes with a binary unit."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def rate(per_s: float | None) -> str:
    """A number per second; `-` if it is not known yet."""
    if per_s is None:
        return "-"
    return f"{per_s:.0f}" if per_s >= 100 else f"{per_s:.1f}"
