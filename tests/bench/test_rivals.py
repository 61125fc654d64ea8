"""The comparison with other systems, with a fake system in real child processes: none of them is needed."""

import json
import os
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.rivals.__main__ import ALL_WORKLOADS, NUM_ROUNDS, RESULTS, default_path
from benchmarks.rivals.child import ROOT, Child, SystemFailed
from benchmarks.rivals.figures import error_of, median_of, systems_with
from benchmarks.rivals.lineup import lineup
from benchmarks.rivals.page_cache import evict
from benchmarks.rivals.plan import LOAD, SYSTEMS, Files, System
from benchmarks.rivals.protocol import Recording, Request
from benchmarks.rivals.report import as_json, table
from benchmarks.rivals.run import Run
from benchmarks.rivals.summary import agreement, latencies, over_rounds, throughput
from benchmarks.rivals.systems.ingine import git_commit
from benchmarks.rivals.workloads import (
    ARRIVALS,
    SHARED_PREFIX_TOKENS,
    START_COLD,
    START_WARM,
    WORKLOADS,
    arriving,
)
from ingine.engine.text.tokenizer import Tokenizer
from tests.bench.fake_system import FakeSteps
from tests.tiny_models import make_tokenizer
from tests.waiting import HANGS_S, wait_until

FAKE = "tests.bench.fake_system"
TIMEOUT_S = HANGS_S
ONE = [Request([1, 2, 3], 4)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer().save_pretrained(folder)
    return Tokenizer.from_folder(folder)


@pytest.fixture
def child(tmp_path):
    started = Child([sys.executable, "-m", FAKE], env={}, log_path=tmp_path / "fake.log")
    yield started
    started.close()


@pytest.fixture
def running(tmp_path):
    with lineup("no-model", log_folder=tmp_path, warm_up=ONE) as systems:
        yield systems


def fake(name: str, *workloads: str, max_rounds: int = 99, **options) -> System:
    return System(name, sys.prefix, FAKE, options, dict.fromkeys(workloads, max_rounds))


def run_of(running, systems, tokenizer, num_rounds=1, **options) -> tuple[Run, list[str]]:
    lines = []
    options = {"requests_per_s": None, **options}
    return Run(running, systems, tokenizer, num_rounds, lines.append, **options), lines


# Workloads


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_system_gets_the_same_prompts_and_none_is_the_beginning_of_another(name, tokenizer):
    requests = WORKLOADS[name].requests(tokenizer, 1)
    assert requests == WORKLOADS[name].requests(tokenizer, 1)
    prompts = sorted(request.prompt for request in requests)
    for first, second in pairwise(prompts):  # sorted, a prefix comes right before a prompt that it begins
        assert second[: len(first)] != first


@pytest.mark.parametrize(
    ("name", "num_requests", "prompt_tokens", "num_tokens"),
    [
        ("1x41", 1, 41, 64),
        ("32x41", 32, 41, 64),
        ("128x41", 128, 41, 64),
        ("32x400", 32, 400, 64),
        ("32-shared", 32, 416, 64),
        ("8x2000", 8, 2000, 128),
    ],
)
def test_workloads_are_as_large_as_their_names_say(name, num_requests, prompt_tokens, num_tokens, tokenizer):
    requests = WORKLOADS[name].requests(tokenizer, 0)
    assert len(requests) == num_requests
    lengths = [len(request.prompt) for request in requests]
    assert statistics.mean(lengths) == pytest.approx(prompt_tokens, abs=1)
    assert {request.num_tokens for request in requests} == {num_tokens}


def test_a_shared_prefix_is_shared_within_a_round_and_new_in_the_next(tokenizer):
    rounds = [WORKLOADS["32-shared"].requests(tokenizer, number) for number in range(3)]
    prefixes = [{tuple(request.prompt[:SHARED_PREFIX_TOKENS]) for request in requests} for requests in rounds]
    assert [len(of_round) for of_round in prefixes] == [1, 1, 1]
    assert len(set.union(*prefixes)) == 3


def test_arrivals_are_one_draw_that_the_rate_stretches(tokenizer):
    mixed = WORKLOADS["mixed"].requests(tokenizer, 0)
    slow, fast = arriving(mixed, 2.0), arriving(mixed, 4.0)
    times = [request.arrival_s for request in slow]
    assert times == sorted(times)
    assert [request.arrival_s * 2 for request in fast] == pytest.approx(times)
    assert len(times) / times[-1] == pytest.approx(2.0, rel=0.2)
    assert [request.prompt for request in slow] == [request.prompt for request in mixed]


# One system in a child process


def test_a_child_loads_and_runs_whatever_it_prints(child, tmp_path):
    said = child.load("no-model", {}, timeout_s=TIMEOUT_S)
    assert said["versions"] == {"fake": "1"}
    answer = child.run([Request([1], 3), Request([2], 2)], timeout_s=TIMEOUT_S)
    assert [len(times) for times in answer["token_times_s"]] == [3, 2]
    assert answer["first_token_ids"] == [5, 5]
    assert "libraries print what they like: 1" in (tmp_path / "fake.log").read_text()


def test_nobody_is_told_of_a_request_before_it_arrives(child):
    child.load("no-model", {}, timeout_s=TIMEOUT_S)
    requests = [Request([1], 2, arrival_s=0.2), Request([1], 2, arrival_s=0.0)]
    late, early = child.run(requests, timeout_s=TIMEOUT_S)["token_times_s"]
    assert early[-1] < 0.2 <= late[0]


def test_an_error_is_answered_and_the_child_goes_on(child):
    with pytest.raises(SystemFailed, match="ValueError: not today"):
        child.load("no-model", {"refuse": "not today"}, timeout_s=TIMEOUT_S)
    child.load("no-model", {}, timeout_s=TIMEOUT_S)
    with pytest.raises(SystemFailed, match="RuntimeError: no more memory"):
        child.run([Request([1], FakeSteps.RAISES)], timeout_s=TIMEOUT_S)


def test_a_child_that_dies_is_told_by_its_status(child):
    child.load("no-model", {}, timeout_s=TIMEOUT_S)
    with pytest.raises(SystemFailed, match="ended with 7"):
        child.run([Request([1], FakeSteps.DIES)], timeout_s=TIMEOUT_S)


def test_a_child_that_hangs_is_killed(child):
    child.load("no-model", {}, timeout_s=TIMEOUT_S)
    with pytest.raises(SystemFailed, match="ended with -9"):
        child.run([Request([1], FakeSteps.HANGS)], timeout_s=0.2)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
def test_a_child_is_stopped_while_others_have_their_turn(child):
    pid = child.load("no-model", {}, timeout_s=TIMEOUT_S)["settings"]["pid"]
    wait_until(lambda: _state(pid) == "T", what="the stopped child")
    child.run(ONE, timeout_s=TIMEOUT_S)
    wait_until(lambda: _state(pid) == "T", what="the child, stopped again")


@pytest.mark.skipif(sys.platform != "linux", reason="a signal at the parent's death is Linux's")
def test_a_stopped_child_does_not_outlive_the_harness(tmp_path):
    code = f"""
import os, sys
from pathlib import Path
from benchmarks.rivals.child import Child
child = Child([sys.executable, "-m", {FAKE!r}], env={{}}, log_path=Path({str(tmp_path / "log")!r}))
print(child.load("no-model", {{}}, timeout_s={TIMEOUT_S})["settings"]["pid"], flush=True)
os._exit(1)
"""
    died = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANGS_S
    )
    pid = int(died.stdout)
    wait_until(lambda: not Path(f"/proc/{pid}").exists() or _state(pid) == "Z", what="the child's end")


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_recording_refuses_too_few_tokens_and_too_many():
    for token_ids in ([1], [1, 2, 3]):
        recording = Recording([Request([1], 2)])
        recording.tokens(0, token_ids)
        with pytest.raises(ValueError, match=f"{len(token_ids)} tokens instead of 2"):
            recording.as_answer()


# Many systems


def test_systems_take_turns_and_another_one_begins_each_round(running, tokenizer):
    systems = [fake("a", "1x41"), fake("b", "1x41"), fake("c", "1x41", max_rounds=1), fake("d", "8x41")]
    run, lines = run_of(running, systems, tokenizer, num_rounds=3)
    run.measure("1x41")
    assert [line.split()[3] for line in lines] == ["a", "b", "c", "b", "a", "a", "b"]
    assert {result.system: len(result.rounds) for result in run.results} == {"a": 3, "b": 3, "c": 1}


def test_a_failure_is_recorded_and_the_rest_goes_on(running, tokenizer):
    systems = [fake("good", "1x41", "8x41"), fake("refusing", "1x41", "8x41", refuse="no AVX here")]
    run, _ = run_of(running, systems, tokenizer, num_rounds=2)
    run.measure("1x41")
    run.measure("8x41")
    outcomes = {(result.system, result.workload): result for result in run.results}
    for workload in ("1x41", "8x41"):
        assert len(outcomes["good", workload].rounds) == 2
        assert outcomes["refusing", workload].rounds == []
        assert outcomes["refusing", workload].error == "load: ValueError: no AVX here"
    assert set(running.about) == {"good"}


def test_a_system_that_died_on_one_workload_is_loaded_anew_for_the_next(running, tokenizer):
    system = fake("frail", "1x41")
    deadly = [Request([1], FakeSteps.DIES)]
    assert len(running.run(system, ONE)["token_times_s"][0]) == 4
    first_pid = running.about["frail"]["settings"]["pid"]
    with pytest.raises(SystemFailed, match="ended with 7"):
        running.run(system, deadly)
    assert len(running.run(system, ONE)["token_times_s"][0]) == 4
    assert running.about["frail"]["settings"]["pid"] != first_pid


def test_agreement_is_with_the_first_system_of_the_table(running, tokenizer):
    systems = [fake("a", "8x41"), fake("b", "8x41", token_id=6)]
    run, _ = run_of(running, systems, tokenizer, num_rounds=2)
    run.measure("8x41")
    agreements = {r.system: [figures["first_token_agreement"] for figures in r.rounds] for r in run.results}
    assert agreements == {"a": [1, 1], "b": [0, 0]}


def test_arrivals_come_at_a_share_of_what_the_reference_did(running, tokenizer):
    systems = [fake("vllm", "mixed", ARRIVALS), fake("other", ARRIVALS)]
    run, _ = run_of(running, systems, tokenizer)
    run.measure("mixed")
    wall_s = run.results[0].rounds[0]["wall_s"]
    run.measure(ARRIVALS)
    num_requests = len(WORKLOADS["mixed"].requests(tokenizer, 0))
    assert run.requests_per_s == pytest.approx(LOAD * num_requests / wall_s)
    for result in run.results[1:]:
        assert 0 < result.rounds[0]["ttft_p50_s"] <= result.rounds[0]["ttft_p99_s"]


def test_without_the_reference_arrivals_are_recorded_as_failed(running, tokenizer):
    run, _ = run_of(running, [fake("other", ARRIVALS)], tokenizer)
    run.measure(ARRIVALS)
    assert "vllm's in `mixed`" in run.results[0].error


def test_a_start_is_timed_in_a_process_of_its_own(running, tokenizer):
    system = fake("a", "1x41", START_WARM)
    run, _ = run_of(running, [system], tokenizer, num_rounds=2)
    run.measure("1x41")
    pid = running.about["a"]["settings"]["pid"]
    run.measure(START_WARM)
    assert running.about["a"]["settings"]["pid"] != pid
    assert all(figures["first_token_s"] > 0 for figures in run.results[1].rounds)


def test_eviction_reaches_every_file(tmp_path):
    (tmp_path / "folder").mkdir()
    for name in ("model", "folder/library"):
        (tmp_path / name).write_bytes(b"x" * 5000)
    (tmp_path / "link").symlink_to(tmp_path / "model")
    assert evict([tmp_path / "model", tmp_path / "folder"]) == 10_000
    assert evict([tmp_path]) == 10_000


def test_files_are_made_once_before_their_system_is_loaded(running, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.rivals.lineup.MODELS", tmp_path / "models")
    files = Files("made-of-it", sys.prefix, "tests.bench.fake_files", "int8")
    for name in ("first", "second"):
        system = replace(fake(name, "1x41"), files=files)
        running.run(system, ONE)
        path = Path(running.about[name]["settings"]["files"])
        assert path == tmp_path / "models" / "no-model" / "made-of-it"
        assert path.read_text() == "int8 of no-model, once"


def test_files_that_cannot_be_made_are_that_systems_failure(running, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.rivals.lineup.MODELS", tmp_path / "models")
    files = Files("made-of-it", sys.prefix, "tests.bench.fake_files", "impossible")
    system = replace(fake("a", "1x41", START_COLD), files=files)
    with pytest.raises(SystemFailed, match="made-of-it cannot be made: no such weights"):
        running.run(system, ONE)
    run, _ = run_of(running, [system], tokenizer)
    run.measure(START_COLD)
    assert "no such weights" in run.results[0].error
    missing = replace(system, files=replace(files, venv="nowhere"))
    with pytest.raises(SystemFailed, match=r"cannot be made: .*No such file"):
        running.prepare(missing)


# Figures


def test_the_rate_is_all_tokens_by_the_wall_time_of_the_whole():
    assert throughput([[0.5, 1.0], [1.0, 2.0]]) == {"wall_s": 2.0, "tokens_per_s": 2.0}


def test_first_tokens_count_from_arrival_and_gaps_over_all_requests():
    requests = [Request([1], 3, arrival_s=1.0), Request([1], 2, arrival_s=0.0)]
    figures = latencies(requests, [[1.5, 1.75, 2.75], [0.25, 0.5]])
    assert (figures["ttft_p50_s"], figures["ttft_p99_s"]) == (0.25, 0.5)
    assert (figures["tbt_p50_s"], figures["tbt_p95_s"]) == (0.25, 1.0)


def test_rounds_are_summed_up_figure_by_figure():
    rounds = [{"wall_s": 4.0, "x": 1}, {"wall_s": 2.0, "x": 3}, {"wall_s": 9.0, "x": 2}]
    assert over_rounds(rounds) == {
        "wall_s": {"median": 4.0, "min": 2.0, "max": 9.0},
        "x": {"median": 2, "min": 1, "max": 3},
    }
    assert over_rounds([]) == {}


def test_agreement_is_a_share():
    assert agreement([1, 2, 3, 4], [1, 2, 9, 4]) == 0.75


# The report


@pytest.fixture
def report(running, tokenizer) -> dict:
    workloads = ("1x41", "8x41", "32-shared", ARRIVALS, START_WARM)
    systems = [fake("ingine", *workloads), fake("vllm", *workloads, refuse="no room"), fake("new", "8x41")]
    run, _ = run_of(running, systems, tokenizer, requests_per_s=500.0)
    for workload in workloads:
        run.measure(workload)
    skipped = {"vllm-zen": "not an AMD processor"}
    about = {"model": "none", "num_rounds": 1, "workloads": {}, "systems": running.about, "skipped": skipped}
    return json.loads(json.dumps(as_json(run.results, requests_per_s=run.requests_per_s, **about)))


def test_a_report_has_medians_rounds_failures_and_settings(report):
    assert median_of(report, "ingine", "8x41", "tokens_per_s") > 0
    assert median_of(report, "vllm", "8x41", "tokens_per_s") is None
    assert error_of(report, "vllm", "8x41") == "load: ValueError: no room"
    assert error_of(report, "ingine", "8x41") is None
    assert systems_with(report, ["1x41", "8x41"], "tokens_per_s") == ["ingine", "new"]
    assert report["systems"]["ingine"]["versions"] == {"fake": "1"}
    assert report["machine"]["cpus"] == os.cpu_count()


def test_the_table_shows_each_system_and_why_one_failed(report):
    console = Console(width=200, record=True, quiet=False, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(table(report))
    text = console.export_text()
    assert "failed: load: ValueError: no room" in text
    assert "vllm-zen skipped: not an AMD processor" in text
    assert "TTFT p50 ms" in text
    assert text.count("ingine") == 5
    assert [line.split()[2] for line in text.splitlines() if line.split()[1:2] == ["new"]] == ["1"]  # rounds


def test_plots_are_drawn_from_a_report_with_gaps_in_it(report, tmp_path):
    pytest.importorskip("matplotlib", reason="lives in .rivals/plots, which only `make bench-rivals` sets up")
    from benchmarks.rivals.plots import draw_all

    path = tmp_path / "rivals-neon.json"
    path.write_text(json.dumps(report))
    drawn = {path.name: path.read_text() for path in draw_all(path)}
    assert set(drawn) == {f"rivals-neon-{name}.svg" for name in ("streams", "long", "latency", "start")}
    assert ">new</text>" in drawn["rivals-neon-streams.svg"]
    assert ">failed</text>" not in drawn["rivals-neon-start.svg"]  # a system without any figure has no row


def test_a_part_of_a_run_is_written_only_where_it_is_told_to():
    systems = list(SYSTEMS.values())
    assert default_path(ALL_WORKLOADS, systems, NUM_ROUNDS, None) == RESULTS
    assert default_path(ALL_WORKLOADS[1:], systems, NUM_ROUNDS, None) is None
    assert default_path(ALL_WORKLOADS, systems[1:], NUM_ROUNDS, None) is None
    assert default_path(ALL_WORKLOADS, systems, 1, None) is None
    assert default_path(ALL_WORKLOADS, systems, NUM_ROUNDS, 2.0) is None


def test_ingine_says_which_commit_it_is(monkeypatch):
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", git_commit().get("commit", "0" * 40))  # {}: no checkout
    monkeypatch.setenv("PATH", "")
    assert git_commit() == {}


# The plan


def test_every_system_can_be_set_up_and_run_by_what_is_committed():
    known = {*WORKLOADS, ARRIVALS, START_COLD, START_WARM}
    installed = re.search(r"^RIVALS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split()
    installed += ["vllm-zen"]  # on AMD's CPUs
    for system in SYSTEMS.values():
        assert system.max_rounds.keys() <= known
        made_by = [system.files] if system.files else []
        for each in (system, *made_by):
            assert (ROOT / each.module.replace(".", "/")).with_suffix(".py").is_file()
            if each.venv != ".venv":
                assert Path(each.venv).name in installed
                pins = ROOT / "benchmarks/rivals/requirements" / f"{Path(each.venv).name}.txt"
                assert "==" in pins.read_text()
    assert {workload for system in SYSTEMS.values() for workload in system.max_rounds} == known
