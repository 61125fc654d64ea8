"""Cells as one JSON document."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from benchmarks.gpu_check.cells import MACHINE, NO_TIME_LEFT, Cell
from benchmarks.gpu_check.plan import Plan

EXACTNESS = ("kernels", "engine")
"""Parts whose cells must all pass; that others fail is told, and no more."""

Report = dict[str, Any]


def as_json(cells: Sequence[Cell], plan: Plan, *, dry_run: bool) -> Report:
    """`machine` is None if no part could say where it ran. `exact`: nothing that was checked was wrong, and
    nothing was left unchecked for want of time. What the machine cannot run does not count.
    """
    machines = [cell.figures for cell in cells if cell.name == MACHINE and cell.figures]
    checks = [cell for cell in cells if cell.part in EXACTNESS]
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "dry_run": dry_run,
        "exact": all(cell.passed and cell.skipped != NO_TIME_LEFT for cell in checks),
        "machine": machines[0] if machines else None,
        "plan": asdict(plan),
        "cells": [asdict(cell) for cell in cells if cell.name != MACHINE or not cell.passed],
    }


def figures_of(report: Report, *names: str, part: str = "speed") -> list[dict[str, Any]]:
    """Settings and figures, in one, of the part's cells that have figures; with `names` of these only."""
    return [
        {"name": cell["name"], **cell["settings"], **cell["figures"]}
        for cell in report["cells"]
        if cell["part"] == part and cell["figures"] is not None and (not names or cell["name"] in names)
    ]
