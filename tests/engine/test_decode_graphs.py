"""Decode steps that are replayed: here from a tape, which repeats what was captured as a CUDA graph does."""

import pytest
import torch

from ingine.engine.kernels.layers.linear import Linear
from ingine.engine.kernels.select import triton_kernels
from ingine.engine.models.loader import load_model
from ingine.engine.request import EngineRequest
from ingine.engine.run.graphs import Choice, DecodeGraphs, bucket_sizes
from ingine.sampling_params import SamplingParams
from tests.engine.conftest import LoadedModel
from tests.engine.driving import Driver, greedy, make_engine, run_one
from tests.engine.marks import needs_interpreter
from tests.engine.packed import forward_by_length
from tests.engine.tape import Tape
from tests.engine.test_equality import PROMPTS as ALL_PROMPTS
from tests.engine.test_resume import PARAMS, PROMPT

pytestmark = needs_interpreter
MAX_TOKENS = 4
PROMPTS = ALL_PROMPTS[1:4]
"""Under the interpreter every token takes its time."""


@pytest.fixture(scope="module")
def captured(tiny):
    """The tiny model with the kernels of a GPU."""

    def load(arch: str) -> LoadedModel:
        model = tiny(arch)
        decoder = load_model(
            model.path, dtype=torch.float32, device=torch.device("cpu"), kernels=triton_kernels()
        )
        return LoadedModel(model.path, decoder, model.tokenizer, model.hf_model)

    return load


@pytest.fixture
def replays(monkeypatch) -> list[tuple[int, Choice | None]]:
    """Lets engines capture tapes. Steps that are replayed: how many sequences, and how these are sampled."""
    monkeypatch.setattr(
        "ingine.engine.build.capture_for", lambda device: lambda step: Tape.capture(step).replay
    )
    seen: list[tuple[int, Choice | None]] = []
    run_model, sample = DecodeGraphs.run_model, DecodeGraphs.sample

    def watched_model(self, inputs):
        seen.append((len(inputs.query_lens), None))
        return run_model(self, inputs)

    def watched_sample(self, num_seqs, choice, rows):
        seen[-1] = (num_seqs, choice)
        return sample(self, num_seqs, choice, rows)

    monkeypatch.setattr(DecodeGraphs, "run_model", watched_model)
    monkeypatch.setattr(DecodeGraphs, "sample", watched_sample)
    return seen


def test_buckets_are_few_and_hold_every_batch():
    assert bucket_sizes(1) == [1]
    assert bucket_sizes(5) == [1, 2, 4, 5]
    assert bucket_sizes(40) == [1, 2, 4, 8, 16, 32, 40]
    assert bucket_sizes(256) == [1, 2, 4, 8, *range(16, 257, 16)]


@pytest.mark.parametrize(("arch", "is_async"), [("mistral", False), ("qwen2", True), ("qwen3", True)])
def test_replayed_steps_give_the_tokens_of_transformers(captured, replays, arch, is_async):
    """The models have a sliding window, biases, and norms of queries and keys."""
    model = captured(arch)
    driver = Driver(make_engine(model, async_scheduling=is_async, max_num_seqs=5, num_blocks=60))
    for index, prompt in enumerate(PROMPTS):  # they come while others run
        driver.engine.add(EngineRequest(str(index), prompt, greedy(MAX_TOKENS)))
        driver.step()
    results = driver.finish()
    assert [results[str(index)].token_ids for index in range(len(PROMPTS))] == [
        model.hf_greedy(prompt, MAX_TOKENS) for prompt in PROMPTS
    ]
    assert {choice for _, choice in replays} == {Choice.GREEDY}
    assert len({num_seqs for num_seqs, _ in replays}) > 1


def test_all_kinds_of_sampling_in_replayed_steps(captured, llama, replays):
    """Each alone, so that every way to sample is used, and all in one batch."""
    short = {name: params.model_copy(update={"max_tokens": 3}) for name, params in PARAMS.items()}
    expected = {
        name: run_one(make_engine(llama), PROMPT[:10], params).token_ids for name, params in short.items()
    }
    engine = make_engine(captured("llama"), async_scheduling=True, max_num_seqs=6, max_num_batched_tokens=64)
    for name, params in short.items():
        assert run_one(engine, PROMPT[:10], params).token_ids == expected[name], name
    assert {choice for _, choice in replays} == {*Choice, None}
    driver = Driver(engine)
    for name, params in short.items():
        engine.add(EngineRequest(name, PROMPT[:10], params))
    assert {name: result.token_ids for name, result in driver.finish().items()} == expected


def test_a_step_that_scores_a_prompt_token_is_not_replayed(captured, llama, replays):
    """A prompt computed token by token, in steps that a graph could run."""
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=1)
    engine = make_engine(captured("llama"), max_num_seqs=1, max_num_batched_tokens=1)
    engine.add(EngineRequest("a", PROMPT[:5], params))
    outputs = []
    while engine.has_unfinished:
        outputs += engine.step()
    _, *entries = outputs[0].prompt_logprobs
    assert [entry["token_id"] for entry in entries] == PROMPT[1:5]
    assert replays


def test_random_rows_of_one_graph_have_each_its_own_numbers(captured, llama, replays):
    """Three in the bucket of four, one of them greedy."""
    kinds = [
        {"temperature": 1.5, "seed": 1},
        {"temperature": 0.7, "seed": 2, "top_p": 0.8},
        {"temperature": 0},
    ]
    params = [SamplingParams(max_tokens=4, **kind) for kind in kinds]
    expected = [run_one(make_engine(llama), PROMPT[:5], p).token_ids for p in params]
    driver = Driver(make_engine(captured("llama"), async_scheduling=True, max_num_seqs=5))
    for index, p in enumerate(params):
        driver.engine.add(EngineRequest(str(index), PROMPT[:5], p))
    results = driver.finish()
    assert [results[str(index)].token_ids for index in range(3)] == expected
    assert set(replays) == {(3, Choice.RANDOM)}


def test_linear_layers_of_a_replayed_step_can_tell_its_sequences_apart(captured, replays, monkeypatch):
    monkeypatch.setattr(Linear, "forward", forward_by_length)

    def generate() -> dict[str, list[int]]:
        driver = Driver(make_engine(captured("llama"), max_num_seqs=5, max_num_batched_tokens=64))
        for index, prompt in enumerate(PROMPTS):
            driver.engine.add(EngineRequest(str(index), prompt, greedy(MAX_TOKENS)))
        return {seq_id: result.token_ids for seq_id, result in driver.finish().items()}

    replayed = generate()
    assert replays
    replays.clear()
    monkeypatch.setattr("ingine.engine.build.capture_for", lambda device: None)
    assert generate() == replayed
    assert not replays


def test_memory_for_kv_is_less_a_step_and_what_graphs_keep(captured, monkeypatch, replays):
    monkeypatch.setattr("ingine.engine.build.warm_up", lambda *_: 1 << 20)
    asked = []

    def num_kv_blocks(config, device, bytes_per_block, *, step_bytes, mapped_bytes):
        asked.append(step_bytes)
        return 40

    monkeypatch.setattr("ingine.engine.build.num_kv_blocks", num_kv_blocks)
    make_engine(captured("llama"), max_num_seqs=1)
    monkeypatch.setattr("ingine.engine.build.capture_for", lambda device: None)
    make_engine(captured("llama"), max_num_seqs=1)
    assert asked == [2 << 20, 1 << 20]


def test_what_is_not_finite_ends_in_a_replayed_step_too(captured, replays):
    model = captured("llama")
    driver = Driver(make_engine(model, async_scheduling=True, max_num_seqs=2))
    driver.engine.add(EngineRequest("sick", PROMPT[:4], greedy(MAX_TOKENS)))
    driver.engine.add(EngineRequest("well", PROMPT[:5], greedy(MAX_TOKENS)))
    while len(driver.results) < 2:
        driver.step()
    [sick] = [seq for seq in driver.engine._scheduler.running if seq.seq_id == "sick"]
    with torch.inference_mode():
        for _, values in driver.engine._runner._kv_caches:
            values[sick.block_table[0]] = torch.nan
    results = driver.finish()
    assert results["sick"].finish_reason == "error" and len(results["sick"].token_ids) < MAX_TOKENS
    assert results["well"].token_ids == model.hf_greedy(PROMPT[:5], MAX_TOKENS)
