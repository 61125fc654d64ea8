"""Combines cells into one JSON document."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from benchmarks.gpu_check.cells import MACHINE, NO_TIME_LEFT, Cell
from benchmarks.gpu_check.plan import Plan

EXACTNESS = ("kernels", "engine")
"""Parts whose cells must all pass. Failures of other parts are only reported."""

Report = dict[str, Any]


def as_json(cells: Sequence[Cell], plan: Plan, *, dry_run: bool) -> Report:
    """The report. `machine` is None if no part described it.

    `exact` is true if no check failed and none was skipped for lack of time. Checks that the machine cannot
    run do not count.
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
    """Settings and figures, merged, of the part's cells that have figures; optionally only of the cells
    `names`."""
    return [
        {"name": cell["name"], **cell["settings"], **cell["figures"]}
        for cell in report["cells"]
        if cell["part"] == part and cell["figures"] is not None and (not names or cell["name"] in names)
    ]
