"""Reads a document's tables, so that tests can compare them with the code."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def table(document: str, heading: str, first: str = "") -> list[dict[str, str]]:
    """The rows of the first table under `## heading`, as dicts by column. Backticks are removed.

    first: the first word of the table's head, if it is not the first table there.
    """
    section = _section((ROOT / document).read_text().splitlines(), heading, first)
    lines = [line for line in section if line.startswith("|")]
    head, _, *rows = [_cells(line) for line in lines]
    assert rows, f"{document} has no table under {heading!r}"
    return [dict(zip(head, row, strict=True)) for row in rows]


def _section(lines: list[str], heading: str, word: str) -> list[str]:
    """The lines from the table's head up to the next blank line."""
    start = lines.index(f"## {heading}")
    first = next(index for index in range(start, len(lines)) if lines[index].startswith(f"| {word}".rstrip()))
    end = next((index for index in range(first, len(lines)) if not lines[index]), len(lines))
    return lines[first:end]


def _cells(line: str) -> list[str]:
    inner = line.strip().strip("|").replace(r"\|", "\0")
    return [cell.strip().replace("`", "").replace("\0", "|") for cell in inner.split("|")]
