"""`make gpu-check` as its dry run: the same code on the CPU, in Triton's interpreter. No GPU is needed."""

import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_check import attention_checks, bandwidth, engine_checks, sampling_checks, speed, streams
from benchmarks.gpu_check.cells import NO_TIME_LEFT, Cell, Cells, Skipped, read_cells
from benchmarks.gpu_check.hugging_face import padded
from benchmarks.gpu_check.part import MODULES
from benchmarks.gpu_check.plan import DRY, FULL
from benchmarks.gpu_check.random_model import model_config
from benchmarks.gpu_check.report import as_json, figures_of
from benchmarks.gpu_check.run import GRACE_S, ROOT, run_parts
from benchmarks.gpu_check.settings import VARIANTS
from benchmarks.gpu_check.subject import Subject
from benchmarks.gpu_check.tables import tables
from benchmarks.gpu_check.timing import seconds_each
from benchmarks.gpu_check.trace import NUM_CHARACTERS, NUM_STEPS, group_of, summarize
from ingine import device_sampling
from ingine.attention import TorchAttention
from ingine.engine import Engine
from ingine.kernels import REFERENCE
from ingine.models import Decoder
from ingine.triton_kernels import kv_write, layer_ops, paged_decode, paged_prefill, sampling

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> dict:
    """Of one dry run, which must come out with status 0. Whoever asked the network would ask a dead proxy."""
    out = tmp_path_factory.mktemp("gpu-check")
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--dry-run", "--out", str(out)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    env |= dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    return json.loads((out / "gpu-cpu.json").read_text())


@pytest.fixture
def cells(tmp_path) -> Cells:
    return Cells("part", tmp_path / "cells.jsonl", until=time.time() + 60)


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """Its `now` is all that time is measured by; it stands still."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def found_by(cells: Cells) -> list[Cell]:
    return read_cells(cells._path)


# The dry run


def test_everything_runs_and_is_exact(report):
    assert report["dry_run"] and report["exact"]
    assert {cell["part"] for cell in report["cells"]} == set(MODULES)
    assert [cell for cell in report["cells"] if cell["error"]] == []
    skipped = {cell["skipped"] for cell in report["cells"]} - {None}
    assert skipped == {"it runs on CUDA only"}


def test_every_kind_of_check_is_there(report):
    kernels = {row["name"] for row in figures_of(report, part="kernels")}
    assert kernels == {
        *("rms_norm", "rms_norm of heads", "add_rms_norm", "silu_mul"),
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
    """Here each takes no time, and so leaves all of its own to the next."""
    given = {}

    def run(command, *, timeout, **options):
        given[command[3]] = timeout
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", run)
    plan = replace(DRY, seconds={"kernels": 10, "engine": 20, "speed": 30}, total_s=100)
    assert run_parts(list(plan.seconds), plan, dry_run=True) == []
    assert given == pytest.approx({"kernels": 50, "engine": 70, "speed": 100}, abs=1)
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
    ended = subprocess.run(
        [*command, "--until", str(time.time() + 60)], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode == 1 and "--dry-run" in ended.stderr


# That a check would see it


def test_attention_that_is_a_little_off_is_seen():
    class Off(TorchAttention):
        def forward(self, *args, **options):
            return super().forward(*args, **options) + 1e-4

    case = attention_checks.random_case(0, tiny=True)[0]
    assert attention_checks._compare(case, TorchAttention(), "auto", 0, DRY, CPU)["ok"]
    assert not attention_checks._compare(case, Off(), "auto", 0, DRY, CPU)["ok"]


def test_attention_cases_have_every_kind():
    cases = [attention_checks.random_case(seed, tiny=False) for seed in range(FULL.num_attention_cases)]
    attentions, kinds = zip(*cases, strict=True)
    assert {attention.head_dim for attention in attentions} == {64, 96, 128}
    assert {attention.num_heads // attention.num_kv_heads for attention in attentions} == set(range(1, 9))
    assert {attention.block_size for attention in attentions} == {16, 32, 64, 128, 256}
    assert {(case[0].dtype, case[1]) for case in cases} == {
        (dtype, kind) for dtype in (torch.float32, torch.bfloat16) for kind in ("auto", "int8", "fp8")
    }
    assert any(attention.sliding_window for attention in attentions) and set(kinds) == {"auto", "int8", "fp8"}


def test_a_wrong_draw_is_seen_and_one_at_an_edge_is_forgiven(monkeypatch):
    right = device_sampling.choose
    monkeypatch.setattr(
        device_sampling, "choose", lambda logits, rows: (right(logits, rows) + 1) % logits.shape[1]
    )
    figures = sampling_checks._check(torch.float32, DRY, CPU)
    assert not figures["ok"] and figures["num_different"] == figures["num_rows"]


TWO = torch.zeros(2)
"""Logits of two tokens, of one half each."""
MANY = torch.zeros(1 << 20)
"""Of tokens so many that four of them are less than the edge is wide."""


@pytest.mark.parametrize(
    ("logits", "options", "uniform", "found", "forgiven"),
    [
        (TWO, {}, 0.5, 0, True),
        (TWO, {}, 0.499998, 1, True),
        (TWO, {}, 0.49, 1, False),
        (TWO, {}, 0.49, -1, False),
        (TWO, {"temperature": 0.0}, 0.5, 1, False),
        (TWO, {"top_p": 0.500001}, 0.9, 0, True),  # with a little less it is alone
        (TWO, {"top_p": 0.51}, 0.9, 0, False),
        (TWO, {"top_k": 1}, 0.5, 1, False),
        (TWO, {"top_k": 1}, 0.999999, 1, False),
        (torch.tensor([0.0, 1.0]), {}, 0.1, 1, False),
        (torch.tensor([0.0, 1.0]), {"top_k": 2}, 0.1, 1, True),  # there the likeliest goes first
        *((MANY, {}, 0.5, (1 << 19) + near, True) for near in (-4, -3, -2, 1, 2, 3)),
        (MANY, {}, 0.5, (1 << 19) + 6, False),
        (TWO * torch.nan, {}, 0.5, 0, False),
    ],
)
def test_only_what_is_at_an_edge_is_forgiven(logits, options, uniform, found, forgiven):
    params = sampling_checks.SamplingParams(**{"temperature": 1.0} | options)
    assert sampling_checks._is_at_an_edge(logits, params, uniform, found) is forgiven


def test_a_wrong_token_is_told_with_its_place():
    class SureModel:
        def margins(self, prompt: list[int], tokens: list[int]) -> list[float]:
            return [0.5, 1.5, 2.5] if (prompt, tokens) == ([1], [4, 5, 6]) else []

    prompts, expected = [[1], [1]], [[2, 3], [4, 5, 6]]
    assert engine_checks._compare(SureModel(), prompts, expected, expected)["ok"]
    assert engine_checks._compare(SureModel(), prompts, expected, [[2, 3], [4, 5, 7]]) == {
        "ok": False,
        "sequence": 1,
        "position": 2,
        "margin": 2.5,
    }
    assert engine_checks._compare(SureModel(), prompts, expected, [[2, 3], [4, 5]])["position"] == 2


@pytest.mark.parametrize("architecture", FULL.architectures)
def test_no_token_of_the_tiny_models_is_near_a_tie(architecture, tmp_path):
    """Or a GPU's rounding could be right and decide otherwise."""
    model = engine_checks.Model.make(tmp_path, architecture, replace(FULL, device="cpu"))
    for prompt in engine_checks.make_prompts(FULL):
        tokens = model.expected(prompt, FULL.num_new_tokens)
        assert min(model.margins(prompt, tokens)) > 3e-4


def test_tokens_that_cuda_graphs_draw_are_held_against_those_drawn_without(tmp_path, monkeypatch):
    model = engine_checks.Model.make(tmp_path, "qwen2", DRY)
    finish = engine_checks.finish

    def check(finish) -> bool:
        monkeypatch.setattr(engine_checks, "finish", finish)
        kinds = engine_checks.SAMPLING["random sampling"]
        return engine_checks._compare_sampling(model, [[7, 8]], replace(DRY, num_new_tokens=2), kinds)["ok"]

    def wrong_with_graphs(engine: Engine) -> dict[str, list[int]]:
        found = finish(engine)
        return {"0": [-1]} if model.decoder.kernels.attention.can_be_captured else found

    assert check(finish)
    assert not check(wrong_with_graphs)


# What figures mean


def test_seconds_are_the_mean_of_calls(clock):
    def work():
        clock.now += 0.5

    assert seconds_each(work, CPU, repeats=4) == 0.5


def test_bandwidth_is_of_all_bytes_and_the_fastest_round(monkeypatch):
    touched, seconds = [], iter([9, 9, 9, *(8, 4, 16), *(2, 5, 20), *(4, 10, 10)])

    class Touches(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            touched.append(sum(arg.nbytes for arg in args if isinstance(arg, torch.Tensor)))
            return func(*args, **(kwargs or {}))

    def timed(work, device, **options):
        with Touches():
            work()
        return next(seconds)

    monkeypatch.setattr(bandwidth, "seconds_each", timed)
    assert bandwidth.measure_bandwidth(800, CPU) == {
        "sum_bytes_per_s": 400,
        "dot_bytes_per_s": 200,
        "copy_bytes_per_s": 80,
        "bytes_per_s": 400,
    }
    assert set(touched) == {800}


def test_rates_of_streams():
    """Four tokens, of which the first is there after a second."""
    found = streams.rates(10.0, [11.0, 12.0, 12.0, 13.0])
    assert found == {"wall_s": 3, "tokens_per_s": 4 / 3, "tokens_per_s_after_the_first": 3 / 2}


def test_rate_of_hugging_face(clock):
    class Model:
        device = CPU

        def generate(self, input_ids, *, max_new_tokens, **options):
            assert (input_ids.tolist(), max_new_tokens) == ([[1, 2], [3, 4]], 8)
            clock.now += 4

    assert padded(Model(), [[1, 2], [3, 4]], 8) == {"wall_s": 4, "tokens_per_s": 4}


def test_rates_of_prefill_and_decoding(clock, monkeypatch):
    """Each step takes a second: of 12 tokens in all three go through in each, then two sequences decode."""
    step = Engine.step

    def timed(self):
        clock.now += 1
        return step(self)

    monkeypatch.setattr(Engine, "step", timed)
    plan = replace(DRY, num_batched_tokens=3)
    subject = Subject.build(plan, REFERENCE, max_num_seqs=2, context=6, block_size=16, async_scheduling=False)
    figures = subject.decode(plan, 2, 6, bytes_per_s=1e5)
    assert (figures["step_ms"], figures["median_step_ms"], figures["tokens_per_s"]) == (1000, 1000, 2)
    num_prefill_steps = 2 + 3  # the first sequence decodes along with the second's prompt: two tokens a step
    assert figures["prefill_tokens_per_s"] == 12 / num_prefill_steps
    assert figures["roofline_share"] == pytest.approx(figures["step_bytes"] / 1e5)


def test_what_is_wanted_most_is_measured_first():
    order = speed.in_order(FULL)
    assert order[:3] == [(1, 1024), (32, 1024), (256, 1024)]
    assert order[3] == (1, 128) and order[-1] == (256, 4096)
    assert sorted(order) == sorted((batch, context) for batch in FULL.batches for context in FULL.contexts)


def test_what_prompts_leave_no_time_for_is_skipped(cells):
    with pytest.raises(Skipped, match="prompts would take 100 s, and "):
        speed._decode(None, DRY, 1, 5, None, 100, cells)


def test_bytes_of_a_step_are_those_of_the_shape():
    """Qwen2.5-1.5B: 3.09 GB of weights in bfloat16, and 28 KiB of KV a token."""
    config = model_config(FULL.shape, torch.bfloat16)
    model = Decoder(config, REFERENCE, dtype=torch.bfloat16, device=torch.device("meta"))
    assert sum(tensor.nbytes for tensor in model.checkpoint_tensors().values()) == 3_087_428_608
    assert model.bytes_per_block(16) / 16 == 28 * 1024


def test_who_begins_first_still_decodes_when_the_last_begins():
    """Prompts are computed a budget at a time, and who has begun gets a token with each of these steps."""
    plan = replace(DRY, num_batched_tokens=4)
    subject = Subject.build(plan, REFERENCE, max_num_seqs=3, context=40, block_size=16)
    figures = subject.decode(plan, 3, 40, bytes_per_s=1e9)
    assert figures["mean_len"] > 40 + 20
    kv_bytes = figures["step_bytes"] - subject.weight_bytes
    assert kv_bytes == pytest.approx(3 * figures["mean_len"] * subject.kv_bytes_per_token)
    assert not subject.engine.has_unfinished


def test_what_kv_memory_cannot_hold_is_skipped():
    subject = Subject.build(
        DRY, REFERENCE, max_num_seqs=2, context=5, block_size=16, kv_cache_bytes=3 * 16 * 128
    )
    with pytest.raises(Skipped, match="needs 6 KV blocks, and there are 3"):
        subject.decode(DRY, 2, 5, bytes_per_s=None)


def test_a_trace_adds_up_to_the_step():
    """Two kernels at a time for a while, and a gap."""
    kernels = [
        ("nvjet_hsh_128x64_64x9", 0, 800),
        ("_decode_kernel", 700, 1000),
        ("Memcpy DtoH (Device -> Pinned)", 1500, 1600),
    ]
    figures = summarize([(name, start * NUM_STEPS, end * NUM_STEPS) for name, start, end in kernels])
    assert figures["step_ms"] == pytest.approx(1.6)
    assert figures["groups_ms"] == pytest.approx(
        {"matrix products": 0.8, "attention": 0.3, "copies": 0.1, "gaps": 0.5}
    )


def test_kernels_whose_names_differ_late_are_summed():
    name = "x" * NUM_CHARACTERS
    figures = summarize([(name + "a", 0, 1000 * NUM_STEPS), (name + "b", 0, 3000 * NUM_STEPS)])
    assert figures["kernels_ms"] == {name: 4}


@pytest.mark.parametrize(
    ("name", "group"),
    [
        (kv_write._write_kernel.__name__, "attention"),
        (paged_decode._decode_kernel.__name__, "attention"),
        (paged_decode._reduce_kernel.__name__, "attention"),
        (paged_prefill._prefill_kernel.__name__, "attention"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128>>", "attention"),
        (layer_ops.rms_norm_kernel.__name__, "norms and activation"),
        (layer_ops.add_rms_norm_kernel.__name__, "norms and activation"),
        (layer_ops.silu_mul_kernel.__name__, "norms and activation"),
        (sampling.choose_kernel.__name__, "sampling"),
        ("void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, MaxOps<float>>>", "sampling"),
        ("void at::native::sbtopk::gatherTopK<float, unsigned int, 2, false>", "sampling"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize64x64x64", "matrix products"),
        ("void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>", "matrix products"),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::AddFunctor>", "rest"),
    ],
)
def test_kernels_are_told_apart(name, group):
    assert group_of(name) == group


def test_the_wheels_are_of_versions_that_the_tests_run_with():
    constrained = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    wheels = (ROOT / "benchmarks" / "gpu_check" / "requirements.txt").read_text().splitlines()
    assert {name for name in wheels if not name.startswith("#")} <= constrained
