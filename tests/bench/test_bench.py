"""`ingine bench` on a tiny random model: every mode runs, and the figures measure what they claim."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from ingine.bench.measure import Measurement, Stopwatch, median
from ingine.bench.run import CONTINUOUS, HF, ONE, REDIS, print_table, run
from ingine.errors import ConfigError
from tests.tiny_models import make_tiny_model
from tests.waiting import HANGS_S

SMALL = """
from ingine.bench import workload
workload.NUM_OUTPUT_TOKENS = 8
workload.SAMPLING = workload.SAMPLING.model_copy(update={"max_tokens": 8})
from ingine.bench import run
run.BATCH_SIZES = (2, 5)
from ingine.cli.main import main
main()
"""
"""The command with fewer and shorter requests."""


@pytest.mark.parametrize(
    ("program", "sizes", "num_tokens"),
    [
        pytest.param(["-c", SMALL], (2, 5), 8, id="small"),
        pytest.param(["-m", "ingine.cli.main"], (8, 32), 64, id="as it is", marks=pytest.mark.wide),
    ],
)
def test_bench_measures_every_mode(tmp_path, program, sizes, num_tokens):
    model = make_tiny_model(tmp_path / "model", max_position_embeddings=160)  # just long enough
    path = tmp_path / "results" / "bench.json"
    command = [sys.executable, *program, "bench", "--model", str(model), "--rounds", "1", "--json", str(path)]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert f"ours through Redis / ours continuous, {sizes[1]} requests" in shown.stdout

    written = json.loads(path.read_text())
    modes = {(row["mode"], row["num_requests"]): row for row in written["results"]}
    assert len(modes) == 8 and {num_requests for _, num_requests in modes} == set(sizes)
    assert written["num_output_tokens"] == num_tokens
    for (_, num_requests), row in modes.items():
        assert len(row["rounds"]) == 1
        for measured in row["rounds"]:
            assert measured["num_tokens"] == num_requests * written["num_output_tokens"]
            assert 0 < measured["first_token_p50_s"] <= measured["latency_p50_s"] <= measured["wall_s"]
    assert len(written["ratios"]) == 6


@pytest.mark.parametrize("width", [80, 40])
def test_no_figure_of_the_table_is_cut_off(width):
    """The table has at least 80 columns; a narrower terminal wraps its lines."""
    slow = Measurement(32, 2048, 1234.56, 98765.4, 1234.56, 1234.57, 1234.58, 1234.59)
    console = Console(file=io.StringIO(), width=width)
    print_table(console, {(mode, 32): [slow] for mode in (HF, ONE, CONTINUOUS, REDIS)})
    shown = console.file.getvalue()
    for figure in ("1234.56", "98765.4", "1234.57", "1234.58", "1234.59", HF, ONE, CONTINUOUS, REDIS):
        assert shown.count(figure) >= 1 and "…" not in shown
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80


def test_a_model_that_is_too_short_for_the_workload_is_refused(tmp_path):
    short = make_tiny_model(tmp_path, max_position_embeddings=128)
    with pytest.raises(ConfigError, match="take 160 tokens, and this model 128 at most"):
        run(Console(), model=str(short), num_rounds=1, json_path=tmp_path / "bench.json")


@pytest.mark.parametrize("name", ["", "file/bench.json"])
def test_results_that_cannot_be_written_are_told_before_anything_is_measured(tmp_path, name):
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=f"--json: {tmp_path}.* cannot be written: (Is a directory|File exists)"
    ):
        run(Console(), model="not looked for", num_rounds=1, json_path=tmp_path / name)


def test_the_stopwatch_refuses_a_run_that_lost_tokens():
    watch = Stopwatch(2)
    watch.tokens(0, 3)
    watch.tokens(1, 2)
    with pytest.raises(ValueError, match=r"\[3, 2\]"):
        watch.read(expected=3)


def test_first_and_last_token_of_each_request_are_timed_from_the_start():
    watch = Stopwatch(2)
    for _ in range(3):
        for request in range(2):
            watch.tokens(request, 1)
    measured = watch.read(expected=3)
    assert measured.num_tokens == 6
    assert measured.first_token_p50_s <= measured.first_token_p95_s < measured.latency_p50_s
    assert measured.wall_s == measured.latency_p95_s
    assert measured.tokens_per_s == pytest.approx(6 / measured.wall_s)


def test_the_median_is_taken_figure_by_figure():
    rounds = [Measurement(8, 512, wall_s, 512 / wall_s, 1, 1, first, first) for wall_s, first in
              ((4.0, 0.1), (2.0, 0.3), (8.0, 0.2))]  # fmt: skip
    middle = median(rounds)
    assert (middle.wall_s, middle.first_token_p50_s, middle.num_tokens) == (4.0, 0.2, 512)
