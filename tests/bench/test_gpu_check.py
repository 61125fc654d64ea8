"""`make gpu-check` as its dry run: the same code on the CPU, in Triton's interpreter. No GPU is needed."""

import json
import math
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.gpu_check import engine_checks
from benchmarks.gpu_check.cells import NO_TIME_LEFT, Cell, Cells, Skipped, read_cells
from benchmarks.gpu_check.part import MODULES
from benchmarks.gpu_check.plan import DRY, FULL
from benchmarks.gpu_check.report import as_json, figures_of
from benchmarks.gpu_check.run import GRACE_S, ROOT, environment, run_parts
from benchmarks.gpu_check.settings import VARIANTS
from benchmarks.gpu_check.tables import tables

NO_NETWORK = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
"""Variables that send any request to a proxy that does not exist."""


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """The report of all parts, run one after the other in one process."""
    path = tmp_path_factory.mktemp("gpu-check") / "report.json"
    command = [sys.executable, "-m", "tests.bench.dry_run", str(path)]
    subprocess.run(command, cwd=ROOT, env=environment(dry_run=True) | NO_NETWORK, check=True)
    return json.loads(path.read_text())


def report_of_command(out: Path, *options: str) -> dict:
    """Run `make gpu-check ARGS=--dry-run`, which must exit with status 0, and return its report."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry-run", "--out", str(out), *options]
    subprocess.run(command, cwd=ROOT, env=os.environ | NO_NETWORK, check=True)
    return json.loads((out / "gpu-cpu.json").read_text())


@pytest.fixture
def cells(tmp_path) -> Cells:
    return Cells("part", tmp_path / "cells.jsonl", until=math.inf)


def found_by(cells: Cells) -> list[Cell]:
    return read_cells(cells._path)


# The dry run


def test_everything_runs_and_is_exact(report):
    assert report["dry_run"] and report["exact"]
    assert {cell["part"] for cell in report["cells"]} == set(MODULES)
    assert [cell for cell in report["cells"] if cell["error"]] == []
    skipped = {cell["skipped"] for cell in report["cells"]} - {None}
    assert skipped == {"it runs on CUDA only"}


def test_the_command_runs_each_part_in_a_process_and_writes_a_report(tmp_path):
    report = report_of_command(tmp_path, "--parts", "kernels,trace")
    assert report["exact"]
    assert {cell["part"] for cell in report["cells"]} == {"kernels", "trace"}


@pytest.mark.wide
def test_the_command_runs_every_part(tmp_path):
    report = report_of_command(tmp_path)
    assert {cell["part"] for cell in report["cells"]} == set(MODULES)
    assert report["exact"] and not any(cell["error"] for cell in report["cells"])


def test_every_kind_of_check_is_there(report):
    kernels = {row["name"] for row in figures_of(report, part="kernels")}
    assert kernels == {
        *("rms_norm", "rms_norm of heads", "add_rms_norm", "silu_mul"),
        "stored product",
        *("sampling", "attention"),
    }
    engine = {row["name"] for row in figures_of(report, part="engine")}
    assert engine == {*engine_checks.MIXES, *engine_checks.SAMPLING, "resumption"}


def test_every_batch_and_context_is_decoded_and_beside_hugging_face(report):
    grid = [(row["batch"], row["context"]) for row in figures_of(report, "decode")]
    assert sorted(grid) == sorted((batch, context) for batch in DRY.batches for context in DRY.contexts)
    for row in figures_of(report, "decode"):
        assert row["tokens_per_s"] == pytest.approx(1e3 * row["batch"] / row["step_ms"])
        [measured] = figures_of(report, "bandwidth")
        least_s = row["step_bytes"] / measured["bytes_per_s"]
        assert row["roofline_share"] == pytest.approx(least_s / (row["step_ms"] / 1e3))
    for name, part in (("ingine", "speed"), ("hf generate", "hf"), ("hf continuous batching", "hf")):
        assert [row["batch"] for row in figures_of(report, name, part=part)] == list(DRY.streams)
    # By the version of transformers, pages have an attention of their own name.
    assert {row["attention"] for row in figures_of(report, part="hf")} <= {"sdpa", "paged|sdpa"}
    assert {row["name"] for row in figures_of(report, part="settings")} == {*VARIANTS, "bandwidth"}


def test_an_engine_in_a_process_is_held_against_itself_alone(report):
    rows = figures_of(report, part="process")
    assert [row["batch"] for row in rows] == list(DRY.hosted)
    for row in rows:
        assert row["share_of_alone"] == pytest.approx(row["tokens_per_s"] / row["alone_tokens_per_s"])
    assert [row["batch"] for row in figures_of(report, part="trace")] == list(DRY.traced)


def test_figures_say_which_machine_and_not_whose(report):
    assert {"name", "torch", "triton", "transformers", "python"} <= report["machine"].keys()
    text = json.dumps(report)
    assert not any(
        private in text for private in (str(ROOT), str(Path.home()) + "/", "/tmp", platform.node())
    )


def test_tables_show_what_failed(report):
    broken = Cell("engine", "short of memory", {"architecture": "llama"}, {"position": 7, "ok": False})
    console = Console(width=160, record=True, file=open(os.devnull, "w"))  # noqa: SIM115 (recorded)
    for table in tables({**report, "cells": [*report["cells"], vars(broken)]}):
        console.print(table)
    shown = console.export_text()
    assert "engine   short of memory architecture=llama: WRONG: position=7 ok=False" in shown
    assert "hf continuous batching" in shown and "matrix products" in shown


def test_plots_are_drawn(report, tmp_path):
    pytest.importorskip("matplotlib", reason="lives on GPU machines, and in .rivals/plots")
    from benchmarks.gpu_check.plots import draw

    drawn = draw(report, tmp_path / "gpu.svg").read_text()
    assert "share of the roofline" in drawn and "matrix products" in drawn


# Cells and parts


def test_a_cell_that_fails_hides_no_other_and_tells_no_folder(cells):
    def broken():
        raise RuntimeError("cannot open /home/someone/.cache/kernel.cubin\nand more")

    assert cells.run("bad", {"batch": 1}, broken) is None
    assert cells.run("good", {}, lambda: {"ok": True}) == {"ok": True}
    bad, good = found_by(cells)
    assert (bad.error, bad.settings) == ("RuntimeError: cannot open kernel.cubin", {"batch": 1})
    assert not bad.passed and good.passed


def test_what_cannot_be_measured_or_has_no_time_left_is_skipped(cells, tmp_path):
    def too_large():
        raise Skipped("needs 9 KV blocks, and there are 4")

    cells.run("large", {}, too_large)
    late = Cells("part", tmp_path / "cells.jsonl", until=time.time())
    assert late.run("late", {}, lambda: {"ok": True}) is None
    assert [cell.skipped for cell in found_by(cells)] == ["needs 9 KV blocks, and there are 4", NO_TIME_LEFT]
    assert all(cell.passed for cell in found_by(cells))


def test_what_was_not_checked_for_want_of_time_is_not_exact():
    checked = Cell("kernels", "rms_norm", figures={"ok": True})
    for cell, exact in (
        (Cell("kernels", "sampling", skipped="it runs on CUDA only"), True),
        (Cell("kernels", "sampling", skipped=NO_TIME_LEFT), False),
        (Cell("speed", "decode", skipped=NO_TIME_LEFT), True),
    ):
        assert as_json([checked, cell], DRY, dry_run=True)["exact"] is exact


def test_a_line_that_a_killed_part_left_unfinished_is_left_out(cells):
    cells.run("whole", {}, lambda: {})
    with cells._path.open("a") as file:
        file.write('{"part": "half')
    assert [cell.name for cell in found_by(cells)] == ["whole"]


def test_a_part_that_hangs_is_killed_and_nothing_counts_as_exact():
    plan = replace(DRY, total_s=0.1)
    [cell] = run_parts(["kernels"], plan, dry_run=True)
    assert cell.error == "killed after 0 s"
    assert not as_json([cell], plan, dry_run=True)["exact"]


def test_parts_have_one_deadline_and_what_those_before_have_left(monkeypatch):
    """Here each part takes no time, and leaves all of its own to the next."""
    given = {}

    def run(command, *, timeout, **options):
        given[command[3]] = timeout
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    plan = replace(DRY, seconds={"kernels": 10, "engine": 20, "speed": 30}, total_s=100)
    assert run_parts(list(plan.seconds), plan, dry_run=True) == []
    assert given == pytest.approx({"kernels": 50, "engine": 70, "speed": 100})
    assert FULL.total_s + 40 <= 8 * 60 and set(FULL.seconds) == set(MODULES)
    assert sum(FULL.seconds.values()) + GRACE_S <= FULL.total_s


def test_without_a_gpu_it_says_what_to_do(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu_check.part",
        "kernels",
        "--cells",
        str(tmp_path / "cells"),
    ]
    ended = subprocess.run([*command, "--until", "inf"], cwd=ROOT, capture_output=True, text=True)
    assert ended.returncode == 1 and "--dry-run" in ended.stderr


def test_the_wheels_are_of_versions_that_the_tests_run_with():
    constrained = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    wheels = (ROOT / "benchmarks" / "gpu_check" / "requirements.txt").read_text().splitlines()
    assert {name for name in wheels if not name.startswith("#")} <= constrained
