"""Draws a report: rates and shares by batch, and the parts of a step's time."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.gpu_check.report import Report, figures_of
from benchmarks.rivals.plots import STYLES  # importing it sets the style of all plots

CONTEXT_COLORS = ("#56B4E9", "#0072B2", "#CC79A7", "#E69F00")
GROUP_COLORS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#767676")
WITH_PREFILL = {
    "ingine": ("speed", "ingine-prefix"),
    "hf generate": ("hf", "hf-padded"),
    "hf continuous batching": ("hf", "hf-continuous"),
}
"""Cells whose rates include the prefill, by name: their part, and a style of the other plots."""


def draw(report: Report, path: Path) -> Path:
    figure = Figure(figsize=(13, 4))
    rates, shares, trace = figure.subplots(1, 3)
    _by_batch(rates, report, "tokens_per_s")
    for name, (part, style) in WITH_PREFILL.items():
        points = [(row["batch"], row["tokens_per_s"]) for row in figures_of(report, name, part=part)]
        _line(rates, points, f"{name}, prefill and all", *STYLES[style])
    rates.set_yscale("log")
    rates.set_title("new tokens a second", loc="left")
    _by_batch(shares, report, "roofline_share")
    shares.set_ylim(0, 1)
    shares.yaxis.set_major_formatter("{x:.0%}")
    shares.set_title("share of the roofline", loc="left")
    _stacks(trace, report)
    figure.suptitle(report["machine"]["name"], x=0.09, ha="left")
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    return path


def _by_batch(axes: Axes, report: Report, figure: str) -> None:
    rows = figures_of(report, "decode")
    for context, color in zip(report["plan"]["contexts"], CONTEXT_COLORS, strict=False):
        points = [(row["batch"], row[figure]) for row in rows if row["context"] == context and row[figure]]
        _line(axes, points, f"decoding, context {context}", color, "o", "-")
    batches = report["plan"]["batches"]
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_xlabel("sequences at once")


def _line(
    axes: Axes, points: Sequence[tuple[int, float]], label: str, color: str, marker: str, style: str
) -> None:
    if points:
        batches, values = zip(*sorted(points), strict=True)
        axes.plot(batches, values, color=color, marker=marker, linestyle=style, label=label)
        axes.legend(fontsize=8)


def _stacks(axes: Axes, report: Report) -> None:
    rows = figures_of(report, part="trace")
    groups = list(dict.fromkeys(group for row in rows for group in row["groups_ms"]))
    bottoms = [0.0] * len(rows)
    for group, color in zip(groups, GROUP_COLORS, strict=False):
        heights = [row["groups_ms"].get(group, 0.0) for row in rows]
        axes.bar(range(len(rows)), heights, bottom=bottoms, color=color, label=group, width=0.6)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set_xticks(range(len(rows)), [str(row["batch"]) for row in rows])
    axes.set_xlabel("sequences at once")
    axes.set_title("a step under the profiler, ms", loc="left")
    axes.grid(axis="x", visible=False)
    if rows:
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
