"""Draws a report's medians beside it: python -m benchmarks.rivals.plots REPORT.json

Runs in a virtual environment of its own (.rivals/plots), the only place where matplotlib is needed.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.rivals.figures import BY_STREAMS, error_of, median_of, systems_with

# Okabe and Ito's colours, which are safe for the colour-blind; a system's variants differ in the marker.
STYLES = {
    "ingine": ("#0072B2", "o", "-"),
    "ingine-prefix": ("#0072B2", "s", "--"),
    "ingine-int8": ("#56B4E9", "D", "-"),
    "ingine-int8-kv": ("#56B4E9", "^", "--"),
    "vllm": ("#D55E00", "o", "-"),
    "vllm-prefix": ("#D55E00", "s", "--"),
    "vllm-eager": ("#D55E00", "v", ":"),
    "llama.cpp-bf16": ("#009E73", "o", "-"),
    "llama.cpp-q8_0": ("#009E73", "^", "--"),
    "llama.cpp-q4_k_m": ("#009E73", "s", "-."),
    "llama.cpp-q4_1": ("#009E73", "v", ":"),
    "llama.cpp-q4_0": ("#009E73", "x", ":"),
    "ingine-int4": ("#56B4E9", "v", "-."),
    "ingine-q8_0": ("#000000", "^", "--"),
    "ingine-q4_k_m": ("#000000", "s", "-."),
    "ingine-q4_1": ("#000000", "v", ":"),
    "vllm-zen": ("#D55E00", "^", "-."),
    "openvino-bf16": ("#CC79A7", "o", "-"),
    "openvino-f32": ("#CC79A7", "s", ":"),
    "openvino-int8": ("#CC79A7", "D", "--"),
    "openvino-int4": ("#CC79A7", "v", "-."),
    "onnxruntime-int8": ("#E69F00", "D", "-"),
    "onnxruntime-int4": ("#E69F00", "v", "-."),
    "hf-sequential": ("#767676", "o", ":"),
    "hf-padded": ("#767676", "s", "-"),
    "hf-continuous": ("#767676", "^", "--"),
}
OTHER_STYLE = ("#F0E442", "x", "-")
LONG = ("32x400", "32-shared", "8x2000", "mixed")
LATENCIES = (("ttft", "time to first token"), ("tbt", "time between tokens"))
PERCENTS = (50, 95, 99)

matplotlib.rcParams.update(
    {
        "svg.fonttype": "none",  # text stays text: small files, and it can be searched
        "svg.hashsalt": "ingine",  # the same report draws the same file
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#DDDDDD",
        "axes.axisbelow": True,
        "legend.frameon": False,
    }
)
Report = dict[str, Any]


def draw_all(path: Path) -> list[Path]:
    """Draw each plot that the report has figures for. Returns the files, named after the report."""
    report = json.loads(path.read_text())
    drawings: dict[str, Callable[[Report], Figure | None]] = {
        "streams": by_streams,
        "long": long_prompts,
        "latency": latency,
        "start": starts,
    }
    written = []
    for name, draw in drawings.items():
        if figure := draw(report):
            written.append(path.with_name(f"{path.stem}-{name}.svg"))
            figure.savefig(written[-1], bbox_inches="tight", metadata={"Date": None})
    return written


def by_streams(report: Report) -> Figure | None:
    systems = systems_with(report, BY_STREAMS.values(), "tokens_per_s")
    if not systems:
        return None
    figure = Figure(figsize=(7.5, 4.5))
    axes = figure.subplots()
    for system in systems:
        points = [
            (streams, rate)
            for streams, workload in BY_STREAMS.items()
            if (rate := median_of(report, system, workload, "tokens_per_s")) is not None
        ]
        color, marker, line = STYLES.get(system, OTHER_STYLE)
        axes.plot(*zip(*points, strict=True), color=color, marker=marker, linestyle=line, label=system)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(BY_STREAMS), [str(streams) for streams in BY_STREAMS])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("streams at once")
    axes.set_ylabel("new tokens a second")
    axes.set_title("41-token prompts, 64 new tokens each", loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def long_prompts(report: Report) -> Figure | None:
    systems = systems_with(report, LONG, "tokens_per_s")
    workloads = [name for name in LONG if any(row["workload"] == name for row in report["results"])]
    if not systems or not workloads:
        return None
    figure = Figure(figsize=(2.6 * len(workloads) + 1.5, 0.35 * len(systems) + 1.2))
    panels = figure.subplots(1, len(workloads), sharey=True, squeeze=False)[0]
    for axes, workload in zip(panels, workloads, strict=True):
        _bars(axes, report, systems, workload, "tokens_per_s", "{:.0f}")
        axes.set_title(workload, loc="left")
        axes.set_xlabel("new tokens a second")
    return figure


def latency(report: Report) -> Figure | None:
    systems = systems_with(report, ["arrivals"], "ttft_p50_s")
    if not systems:
        return None
    figure = Figure(figsize=(8.5, 3.2))
    for axes, (name, title) in zip(figure.subplots(1, 2), LATENCIES, strict=True):
        for row, system in enumerate(systems):
            figures = [f"{name}_p{percent}_s" for percent in PERCENTS]
            heights = [1000 * median_of(report, system, "arrivals", each) for each in figures]
            width = 0.8 / len(systems)
            color = STYLES.get(system, OTHER_STYLE)[0]
            places = [column + (row - (len(systems) - 1) / 2) * width for column in range(len(PERCENTS))]
            bars = axes.bar(places, heights, width=0.92 * width, color=color, label=system)
            axes.bar_label(bars, fmt="{:.0f}", fontsize=8, padding=1)
        axes.set_xticks(range(len(PERCENTS)), [f"p{percent}" for percent in PERCENTS])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.grid(axis="x", visible=False)
        axes.set_title(f"{title}, ms", loc="left")
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def starts(report: Report) -> Figure | None:
    workloads = ("start-warm", "start-cold")
    systems = systems_with(report, workloads, "first_token_s")
    if not systems:
        return None
    figure = Figure(figsize=(7.5, 0.35 * len(systems) + 1.2))
    for axes, workload in zip(figure.subplots(1, 2, sharey=True), workloads, strict=True):
        _bars(axes, report, systems, workload, "first_token_s", "{:.1f}")
        axes.set_title(f"{workload.partition('-')[2]} page cache", loc="left")
        axes.set_xlabel("seconds to the first token")
    return figure


def _bars(axes: Axes, report: Report, systems: Sequence[str], workload: str, figure: str, form: str) -> None:
    """Draw a bar for each system, the first on top.

    A failed system is marked; one that was not run is left empty.
    """
    medians = [median_of(report, system, workload, figure) for system in systems]
    colors = [STYLES.get(system, OTHER_STYLE)[0] for system in systems]
    bars = axes.barh(range(len(systems)), [median or 0 for median in medians], color=colors)
    labels = [
        form.format(median) if median is not None else "failed" if error_of(report, system, workload) else ""
        for system, median in zip(systems, medians, strict=True)
    ]
    axes.bar_label(bars, labels, padding=3)
    axes.set_yticks(range(len(systems)), systems)
    if not axes.yaxis_inverted():
        axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.grid(axis="y", visible=False)


if __name__ == "__main__":
    for path in draw_all(Path(sys.argv[1])):
        print(f"drawn {path}")
