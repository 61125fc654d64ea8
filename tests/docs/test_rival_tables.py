"""The tables of docs/benchmarks.md agree with the results of each kind of machine."""

import json

import pytest

from benchmarks.rivals.markdown_tables import latency_table, rates_table, reports, tables
from tests.docs.tables import ROOT

PAGE = (ROOT / "docs" / "benchmarks.md").read_text()


def test_the_page_has_each_kinds_tables_word_for_word():
    """`python -m benchmarks.rivals.markdown_tables` prints the tables."""
    shown = list(tables())
    assert {kind for kind, _ in shown} == set(reports())
    for kind, lines in shown:
        assert "\n".join(lines) + "\n\n" in PAGE, f"the page lacks {kind}'s table as the results have it"
        assert f"(../benchmarks/results/rivals-{kind}.json)" in PAGE


def test_the_page_has_no_rates_that_no_results_have():
    known = {line for _, lines in tables() for line in lines}
    heads = ("| tokens a second (prompt + output tokens)", "| 200 requests, log-normal lengths")
    lines = PAGE.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(heads)]
    assert len(starts) == len(list(tables()))
    for start in starts:
        end = lines.index("", start)
        assert set(lines[start:end]) <= known


@pytest.fixture
def report() -> dict:
    rates = {
        ("ingine", "1x41"): 100.4,
        ("ingine", "32-shared"): 50.0,
        ("ingine-prefix", "32-shared"): 150.0,
        ("ingine-q8_0", "1x41"): 150.0,
        ("ingine-q4_k_m", "1x41"): 170.0,
        ("vllm", "32-shared"): 75.0,
        ("openvino-bf16", "1x41"): 80.0,
        ("openvino-int8", "1x41"): 1180.0,
        ("vllm-eager", "1x41"): 9.0,
    }
    rows = [
        {"system": system, "workload": workload, "figures": {"tokens_per_s": {"median": rate}}, "error": None}
        for (system, workload), rate in rates.items()
    ]
    failed = {"system": "onnxruntime-int4", "workload": "1x41", "figures": {}, "error": "no room"}
    return json.loads(json.dumps({"results": [*rows, failed]}))


def test_a_column_is_a_systems_best_variant_and_what_has_no_figure_is_left_out(report):
    assert rates_table(report) == [
        "| tokens a second (prompt + output tokens) | ingine | ingine, its best GGUF file | vLLM "
        "| OpenVINO, its best | ingine / vLLM |",
        "| --- | --- | --- | --- | --- | --- |",
        "| 1 stream, 41 + 64 | 100 | 170 (Q4_K_M) | | 1,180 (int8) | |",
        "| 32 streams that share 400 tokens, prefix caching on | 150 | | 75 | | 2.0 |",
    ]


def test_without_arrivals_there_is_no_table_of_latencies(report):
    assert latency_table(report) == []
