"""Renders a report as tables for the terminal."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from rich.box import SIMPLE
from rich.table import Table

from benchmarks.gpu_check.cells import Cell, describe
from benchmarks.gpu_check.report import Report, figures_of


def tables(report: Report) -> list[Table]:
    """All tables that have rows."""
    comparison = [
        *figures_of(report, "ingine"),
        *figures_of(report, "hf generate", "hf continuous batching", part="hf"),
    ]
    variants = [row for row in figures_of(report, part="settings") if row["name"] != "bandwidth"]
    rates = ("tokens_per_s", "median_step_ms", "roofline_share", "prefill_tokens_per_s")
    wall = ("wall_s", "tokens_per_s", "tokens_per_s_after_the_first")
    hosted = ("tokens_per_s", "alone_tokens_per_s", "share_of_alone")
    found = [
        _outcomes(report),
        _table("decoding", figures_of(report, "decode"), ("batch", "context"), rates),
        _table("settings", variants, ("name", "attention", "batch", "context"), rates),
        _table("beside Hugging Face, prefill included", comparison, ("name", "batch", "context"), wall),
        _table("in a process of its own", figures_of(report, part="process"), ("batch", "context"), hosted),
        _traces(report),
        _list("not as it should be", report, lambda cell: not cell.passed),
        _list("skipped", report, lambda cell: cell.skipped is not None),
    ]
    return [table for table in found if table.row_count]


def _outcomes(report: Report) -> Table:
    table = Table(box=SIMPLE, title="cells")
    for column in ("part", "passed", "failed", "skipped"):
        table.add_column(column, justify="left" if column == "part" else "right")
    outcomes: dict[str, Counter[str]] = {}
    for raw in report["cells"]:
        cell = Cell(**raw)
        outcome = "skipped" if cell.skipped is not None else "passed" if cell.passed else "failed"
        outcomes.setdefault(cell.part, Counter())[outcome] += 1
    for part, counts in outcomes.items():
        table.add_row(part, *(str(counts[name]) for name in ("passed", "failed", "skipped")))
    return table


def _table(title: str, rows: list[dict[str, Any]], keys: Sequence[str], figures: Sequence[str]) -> Table:
    table = Table(box=SIMPLE, title=title)
    for column in (*keys, *figures):
        table.add_column(
            column.replace("_", " "), justify="left" if column in ("name", "attention") else "right"
        )
    for row in rows:
        table.add_row(*(_cell(row.get(column), column) for column in (*keys, *figures)))
    return table


def _traces(report: Report) -> Table:
    rows = [
        {"batch": row["batch"], "context": row["context"], "step_ms": row["step_ms"], **row["groups_ms"]}
        for row in figures_of(report, part="trace")
    ]
    groups = list(dict.fromkeys(name for row in rows for name in row if name not in ("batch", "context")))
    return _table("where a step's time goes, ms (under the profiler)", rows, ("batch", "context"), groups)


def _list(title: str, report: Report, is_listed: Callable[[Cell], bool]) -> Table:
    table = Table(box=SIMPLE, title=title, show_header=False)
    for raw in report["cells"]:
        if is_listed(cell := Cell(**raw)):
            table.add_row(describe(cell))
    return table


def _cell(value: Any, column: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if "share" in column:
        return f"{value:.1%}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
