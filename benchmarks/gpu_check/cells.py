"""The results of a part, written as lines of JSON at once, so that a killed part keeps its results."""

import json
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

Figures = dict[str, Any]
"""Figures of a cell. Those of a check for exactness have "ok"."""

MACHINE = "machine"
"""The first cell of every part, which describes the machine."""

_PATH = re.compile(r"(?:/[\w.+-]+)+/(?=[\w.+-]+)")


NO_TIME_LEFT = "no time left"
"""The reason of a cell that another run may measure."""


class Skipped(Exception):
    """Raised if this machine cannot measure a cell, with the reason."""


@dataclass(frozen=True)
class Cell:
    part: str
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    figures: Figures | None = None
    skipped: str | None = None
    error: str | None = None
    seconds: float = 0.0
    """Duration of the measurement."""

    @property
    def passed(self) -> bool:
        return self.error is None and (self.figures or {}).get("ok", True)


class Cells:
    """Writes cells to `path` for a part that starts no cell after `until`, in seconds since the epoch."""

    def __init__(self, part: str, path: Path, until: float):
        self._part, self._path, self._until = part, path, until

    @property
    def seconds_left(self) -> float:
        return self._until - time.time()

    def run(
        self, name: str, settings: dict[str, Any], measure: Callable[..., Figures], *args: Any
    ) -> Figures | None:
        """Run `measure(*args)`, and write its result. Returns None if it raises: other cells shall still run.

        settings: what is measured.
        """
        figures = skipped = error = None
        began = time.perf_counter()
        if self.seconds_left <= 0:
            skipped = NO_TIME_LEFT
        else:
            try:
                figures = measure(*args)
            except Skipped as reason:
                skipped = str(reason)
            except Exception as raised:
                traceback.print_exc()
                error = _in_a_line(raised)
        cell = Cell(
            self._part, name, settings, figures, skipped, error, round(time.perf_counter() - began, 3)
        )
        with self._path.open("a") as file:
            file.write(json.dumps(asdict(cell)) + "\n")
        print(describe(cell), flush=True)
        return figures


def read_cells(path: Path) -> list[Cell]:
    """The complete cells of `path`; none if the part has not written the file."""
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [Cell(**json.loads(line)) for line in lines if line.endswith("\n")]


def describe(cell: Cell) -> str:
    settings = " ".join(f"{name}={value}" for name, value in cell.settings.items())
    if cell.skipped is not None:
        outcome = f"skipped: {cell.skipped}"
    elif cell.error is not None:
        outcome = f"FAILED: {cell.error}"
    else:
        outcome = " ".join(f"{name}={_short(value)}" for name, value in cell.figures.items())
        outcome = outcome if cell.passed else f"WRONG: {outcome}"
    return f"{cell.part:8} {cell.name} {settings}: {outcome}".replace(" :", ":")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _in_a_line(error: Exception) -> str:
    """Type and first line of an error, with files named without folders, which could identify the machine."""
    first = (str(error).strip().splitlines() or [""])[0]
    return _PATH.sub("", f"{type(error).__name__}: {first}")
