"""The results of a run: JSON with all rounds, and a table."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from benchmarks.machine import machine
from benchmarks.rivals.run import Result

COLUMNS = {
    "tokens_per_s": ("tok/s", "{:.1f}", 1),
    "ttft_p50_s": ("TTFT p50 ms", "{:.0f}", 1000),
    "ttft_p95_s": ("p95", "{:.0f}", 1000),
    "ttft_p99_s": ("p99", "{:.0f}", 1000),
    "tbt_p50_s": ("TBT p50 ms", "{:.0f}", 1000),
    "tbt_p95_s": ("p95", "{:.0f}", 1000),
    "tbt_p99_s": ("p99", "{:.0f}", 1000),
    "first_token_s": ("first token s", "{:.2f}", 1),
}
"""Heading, format and factor of each figure in the table."""


def as_json(
    results: Sequence[Result],
    *,
    model: str,
    num_rounds: int,
    workloads: dict[str, dict[str, Any]],
    systems: dict[str, dict[str, Any]],
    skipped: dict[str, str],
    requests_per_s: float | None,
) -> dict[str, Any]:
    """Build the report. systems: versions, settings and environment by name. skipped: reasons by name.
    requests_per_s: the rate of arrivals.
    """
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "model": model,
        "num_rounds": num_rounds,
        "workloads": workloads,
        "arrivals_requests_per_s": requests_per_s,
        "systems": systems,
        "skipped": skipped,
        "results": [result.as_json() for result in results],
    }


def table(report: dict[str, Any]) -> Table:
    """The table of medians, with minimum and maximum of the rates."""
    rows = report["results"]
    shown = [name for name in COLUMNS if any(name in row["figures"] for row in rows)]
    built = Table(box=SIMPLE, title="medians; in brackets least and most")
    built.add_column("workload", no_wrap=True)
    built.add_column("system", no_wrap=True)
    built.add_column("rounds", justify="right")
    for name in shown:
        built.add_column(COLUMNS[name][0], justify="right")
    for row in rows:
        cells = [_cell(row["figures"].get(name), name) for name in shown]
        built.add_row(row["workload"], row["system"], str(len(row["rounds"])), *cells)
        if row["error"]:
            built.add_row("", f"  failed: {row['error'][:70]}")
    for name, reason in report["skipped"].items():
        built.add_row("", f"{name} skipped: {reason}")
    return built


def _cell(figure: dict[str, float] | None, name: str) -> str:
    if figure is None:
        return ""
    _, form, factor = COLUMNS[name]
    median = form.format(figure["median"] * factor)
    if name not in ("tokens_per_s", "first_token_s") or figure["min"] == figure["max"]:
        return median
    return f"{median} ({form.format(figure['min'])} to {form.format(figure['max'])})"
