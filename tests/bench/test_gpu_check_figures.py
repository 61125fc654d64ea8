"""The checks of `make gpu-check` detect faults, and its figures are correct."""

import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.gpu_check import attention_checks, bandwidth, engine_checks, sampling_checks, speed, streams
from benchmarks.gpu_check.cells import Cells, Skipped
from benchmarks.gpu_check.hugging_face import padded
from benchmarks.gpu_check.plan import DRY, FULL
from benchmarks.gpu_check.random_model import model_config
from benchmarks.gpu_check.subject import Subject
from benchmarks.gpu_check.timing import seconds_each
from benchmarks.gpu_check.trace import NUM_CHARACTERS, NUM_STEPS, group_of, summarize
from ingine.engine.engine import Engine
from ingine.engine.kernels.attention import TorchAttention
from ingine.engine.kernels.sampling import cuda as device_sampling
from ingine.engine.kernels.select import REFERENCE
from ingine.engine.kernels.triton import (
    kv_write,
    layer_ops,
    paged_decode,
    paged_prefill,
    sampling,
    stored_linear,
)
from ingine.engine.models.decoder import Decoder

CPU = torch.device("cpu")


@pytest.fixture
def clock(monkeypatch) -> SimpleNamespace:
    """A clock for all measurements. It stands still unless a test changes `now`."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


# Checks detect faults


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
        (dtype, kind) for dtype in (torch.float32, torch.bfloat16) for kind in ("auto", "int8", "int4", "fp8")
    }
    assert any(attention.sliding_window for attention in attentions)
    assert set(kinds) == {"auto", "int8", "int4", "fp8"}


def test_a_wrong_draw_is_seen(monkeypatch):
    right = device_sampling.choose
    monkeypatch.setattr(
        device_sampling, "choose", lambda logits, rows: (right(logits, rows) + 1) % logits.shape[1]
    )
    figures = sampling_checks._check(torch.float32, DRY, CPU)
    assert not figures["ok"] and figures["num_different"] == figures["num_rows"]


TWO = torch.zeros(2)
"""Logits of two tokens, each with probability one half."""
MANY = torch.zeros(1 << 20)
"""Logits of so many tokens that four of them are narrower than the edge."""


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
    """Otherwise a GPU's rounding could choose another token and still be right."""
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


# Figures


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
    """Four tokens, the first after one second."""
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
    """Each step takes a second and three of 12 tokens; then two sequences decode."""
    step = Engine.step

    def timed(self):
        clock.now += 1
        return step(self)

    monkeypatch.setattr(Engine, "step", timed)
    plan = replace(DRY, num_batched_tokens=3)
    subject = Subject.build(plan, REFERENCE, max_num_seqs=2, context=6, block_size=16, async_scheduling=False)
    figures = subject.decode(plan, 2, 6, bytes_per_s=1e5)
    assert (figures["step_ms"], figures["median_step_ms"], figures["tokens_per_s"]) == (1000, 1000, 2)
    num_prefill_steps = 2 + 3  # the first sequence decodes during the second's prompt: two tokens a step
    assert figures["prefill_tokens_per_s"] == 12 / num_prefill_steps
    assert figures["roofline_share"] == pytest.approx(figures["step_bytes"] / 1e5)


def test_what_is_wanted_most_is_measured_first():
    order = speed.in_order(FULL)
    assert order[:3] == [(1, 1024), (32, 1024), (256, 1024)]
    assert order[3] == (1, 128) and order[-1] == (256, 4096)
    assert sorted(order) == sorted((batch, context) for batch in FULL.batches for context in FULL.contexts)


def test_what_prompts_leave_no_time_for_is_skipped(tmp_path):
    cells = Cells("speed", tmp_path / "cells.jsonl", until=time.time() + 60)
    with pytest.raises(Skipped, match="prompts would take 100 s, and "):
        speed._decode(None, DRY, 1, 5, None, 100, cells)


def test_bytes_of_a_step_are_those_of_the_shape():
    """Qwen2.5-1.5B: 3.09 GB of weights in bfloat16, and 28 KiB of KV a token."""
    config = model_config(FULL.shape, torch.bfloat16)
    model = Decoder(config, REFERENCE, dtype=torch.bfloat16, device=torch.device("meta"))
    assert sum(tensor.nbytes for tensor in model.checkpoint_tensors().values()) == 3_087_428_608
    assert model.bytes_per_block(16) / 16 == 28 * 1024


def test_who_begins_first_still_decodes_when_the_last_begins():
    """Prompts take one budget per step, and sequences that have begun get a token in each of these steps."""
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
    """Two kernels that overlap for a while, and a gap."""
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
        (stored_linear.stored_linear_kernel.__name__, "matrix products"),
        (stored_linear.sum_pieces_kernel.__name__, "matrix products"),
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
