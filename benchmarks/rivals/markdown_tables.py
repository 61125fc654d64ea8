"""Print the tables of docs/benchmarks.md: python -m benchmarks.rivals.markdown_tables

There is one set for each kind of machine, from its results. A test compares them with the page.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.rivals.figures import median_of
from benchmarks.rivals.plan import LOAD
from benchmarks.rivals.workloads import START_COLD, START_WARM

RESULTS = Path(__file__).resolve().parents[1] / "results"
Report = dict[str, Any]

ROWS = {
    "1x41": "1 stream, 41 + 64",
    "8x41": "8 streams",
    "32x41": "32 streams",
    "64x41": "64 streams",
    "128x41": "128 streams",
    "32x400": "32 streams, 400 + 64",
    "8x2000": "8 streams, 2,000 + 128",
    "32-shared": "32 streams that share 400 tokens, prefix caching on",
}
COLUMNS = {
    "ingine": {"ingine": ""},
    "ingine, int8": {"ingine-int8": ""},
    "ingine, int8, KV too": {"ingine-int8-kv": ""},
    "ingine, int4": {"ingine-int4": ""},
    "ingine, its best GGUF file": {
        "ingine-q8_0": "Q8_0",
        "ingine-q4_k_m": "Q4_K_M",
        "ingine-q4_1": "Q4_1",
    },
    "vLLM": {"vllm": "", "vllm-zen": "zentorch"},
    "OpenVINO, its best": {
        "openvino-bf16": "bf16",
        "openvino-f32": "f32",
        "openvino-int8": "int8",
        "openvino-int4": "int4",
    },
    "llama.cpp, its best file": {
        f"llama.cpp-{name.lower()}": name for name in ("BF16", "Q8_0", "Q4_K_M", "Q4_1", "Q4_0")
    },
    "onnxruntime-genai, its best": {"onnxruntime-int8": "int8", "onnxruntime-int4": "int4"},
}
"""Heading -> the systems of that column, each with its distinction within the column."""


def reports() -> dict[str, Report]:
    """The reports by kind of machine."""
    paths = sorted(RESULTS.glob("rivals-*.json"))
    return {path.stem.removeprefix("rivals-"): json.loads(path.read_text()) for path in paths}


def rates_table(report: Report) -> list[str]:
    """The table of rates, as lines of Markdown. Rows and columns without a figure are left out, and so are
    systems that a row's workload was not run on."""
    columns = [name for name in COLUMNS if any(_best(report, name, workload) for workload in ROWS)]
    lines = [
        _line(["tokens a second (prompt + output tokens)", *columns, "ingine / vLLM"]),
        _line(["---"] * (len(columns) + 2)),
    ]
    for workload, words in ROWS.items():
        best = [_best(report, name, workload) for name in columns]
        if any(best):
            lines.append(_line([words, *map(_rate, best), _ratio(report, workload)]))
    return lines


def latency_table(report: Report) -> list[str]:
    """The table of latencies, as lines of Markdown; empty if arrivals were not run."""
    systems = {"ingine": "ingine", "vllm": "vLLM, its own budget", "vllm-512": "vLLM, a budget like ours"}
    shown = {
        name: words
        for name, words in systems.items()
        if median_of(report, name, "arrivals", "ttft_p50_s") is not None
    }
    if not shown:
        return []
    rate = f"{report['arrivals_requests_per_s']:.1f} arriving a second ({LOAD} of what vLLM can take)"
    return [
        _line([f"200 requests, log-normal lengths, {rate}", *shown.values()]),
        _line(["---"] * (len(shown) + 1)),
        *(
            _line([f"{words}, p50 / p95 / p99, ms", *(_percentiles(report, name, kind) for name in shown)])
            for kind, words in (("ttft", "time to first token"), ("tbt", "time between tokens"))
        ),
        _line(
            [
                "start of the process to the first token, warm / cold, s",
                *(_starts(report, name) for name in shown),
            ]
        ),
    ]


def _best(report: Report, column: str, workload: str) -> tuple[float, str] | None:
    suffix = "-prefix" if workload == "32-shared" else ""
    found = (
        (rate, label)
        for system, label in COLUMNS[column].items()
        if (rate := _tokens_per_s(report, system, workload, suffix)) is not None
    )
    return max(found, default=None)


def _tokens_per_s(report: Report, system: str, workload: str, suffix: str) -> float | None:
    rate = median_of(report, system + suffix, workload, "tokens_per_s") if suffix else None
    return rate if rate is not None else median_of(report, system, workload, "tokens_per_s")


def _rate(best: tuple[float, str] | None) -> str:
    if best is None:
        return ""
    rate, label = best
    return f"{rate:,.0f} ({label})" if label else f"{rate:,.0f}"


def _ratio(report: Report, workload: str) -> str:
    own, other = (_best(report, column, workload) for column in ("ingine", "vLLM"))
    return f"{own[0] / other[0]:.1f}" if own and other else ""


def _percentiles(report: Report, system: str, kind: str) -> str:
    values = [median_of(report, system, "arrivals", f"{kind}_p{percent}_s") for percent in (50, 95, 99)]
    return " / ".join(f"{1000 * value:.0f}" for value in values)


def _starts(report: Report, system: str) -> str:
    times = [median_of(report, system, workload, "first_token_s") for workload in (START_WARM, START_COLD)]
    return "" if None in times else " / ".join(f"{time_s:.1f}" for time_s in times)


def _line(cells: list[str]) -> str:
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def tables() -> Iterator[tuple[str, list[str]]]:
    """The tables of each kind of machine."""
    for kind, report in reports().items():
        yield kind, rates_table(report)
        if latencies := latency_table(report):
            yield kind, latencies


if __name__ == "__main__":
    for kind, lines in tables():
        print(f"\n{kind}\n", *lines, sep="\n")
