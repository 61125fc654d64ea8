"""Reads medians and systems from a report.

It imports nothing of ingine, which the plots' environment lacks.
"""

from collections.abc import Iterable
from typing import Any

BY_STREAMS = {1: "1x41", 8: "8x41", 32: "32x41", 64: "64x41", 128: "128x41"}
"""The workloads that differ only in the number of streams."""


def median_of(report: dict[str, Any], system: str, workload: str, figure: str) -> float | None:
    """The median of a figure; None if it was not measured."""
    row = _row(report, system, workload)
    return row["figures"].get(figure, {}).get("median")


def error_of(report: dict[str, Any], system: str, workload: str) -> str | None:
    return _row(report, system, workload)["error"]


def systems_with(report: dict[str, Any], workloads: Iterable[str], figure: str) -> list[str]:
    """The systems with this figure for any of these workloads, in the report's order."""
    wanted = set(workloads)
    rows = (row for row in report["results"] if row["workload"] in wanted and figure in row["figures"])
    return list(dict.fromkeys(row["system"] for row in rows))


def _row(report: dict[str, Any], system: str, workload: str) -> dict[str, Any]:
    rows = (row for row in report["results"] if (row["system"], row["workload"]) == (system, workload))
    return next(rows, {"figures": {}, "error": None})
