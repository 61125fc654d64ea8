"""A step is scheduled while the one before is on its way: tokens come a step later, and are the same.

That they are the same in every mix of work is in test_equality.py and test_resume.py.
"""

from functools import partial

import pytest
import torch

from ingine.engine.config import EngineConfig
from ingine.engine.kernels.select import triton_kernels
from ingine.engine.models.loader import load_model
from ingine.engine.request import EngineRequest
from ingine.errors import ConfigError, EngineError
from tests.engine.conftest import LoadedModel
from tests.engine.driving import Driver, Result, greedy, make_engine, run_one
from tests.engine.marks import needs_interpreter
from tests.engine.tape import Tape
from tests.engine.test_resume import PARAMS, PROMPT

CPU = torch.device("cpu")


@pytest.fixture
def driver(llama) -> Driver:
    return Driver(make_engine(llama, async_scheduling=True))


def count_runs(engine, monkeypatch) -> list[list[str]]:
    """The sequences of each step that is launched from now on."""
    runs, forward = [], engine._runner.forward

    def counted(batch):
        runs.append([seq.seq_id for seq in batch.seqs])
        return forward(batch)

    monkeypatch.setattr(engine._runner, "forward", counted)
    return runs


def capture(compute, step):
    """Run `compute` for a step, refusing waits for the device."""
    return Tape.capture(lambda: compute(step)).result


def test_a_token_comes_with_the_next_step(driver, llama):
    driver.engine.add(EngineRequest("a", PROMPT[:4], greedy(3)))
    expected = llama.hf_greedy(PROMPT[:4], 3)
    got = [[output.token_ids for output in driver.step()] for _ in range(4)]
    assert got == [[], [[expected[0]]], [[expected[1]]], [[expected[2]]]]
    assert not driver.engine.has_unfinished


def test_the_last_token_that_a_sequence_may_have_is_not_followed_by_a_step(driver, monkeypatch):
    runs = count_runs(driver.engine, monkeypatch)
    driver.engine.add(EngineRequest("a", PROMPT[:4], greedy(3)))
    driver.finish()
    assert runs == [["a"]] * 3


def test_what_follows_a_stop_token_is_computed_for_nothing_and_told_nobody(llama, driver, monkeypatch):
    expected = llama.hf_greedy(PROMPT[:4], 5)
    assert expected[0] != expected[1]
    runs = count_runs(driver.engine, monkeypatch)
    result = run_one(driver.engine, PROMPT[:4], greedy(9, stop_token_ids=(expected[1],)))
    assert (result.token_ids, result.finish_reason) == (expected[:2], "stop")
    assert len(runs) == 3
    assert driver.engine.stats().num_output_tokens == 2


def test_abort_while_a_step_is_on_its_way(driver, llama):
    for seq_id in ("goes", "stays"):
        driver.engine.add(EngineRequest(seq_id, PROMPT[:4], greedy(9)))
    driver.step()
    driver.step()
    [output] = driver.engine.abort("goes")
    assert (output.position, output.token_ids, output.finish_reason) == (1, [], "abort")
    driver.engine.check_integrity()
    results = driver.finish()
    assert len(results["goes"].token_ids) == 1
    assert results["stays"].token_ids == llama.hf_greedy(PROMPT[:4], 9)


def test_an_id_that_is_used_again_at_once_gets_no_token_of_the_one_before(driver, llama):
    driver.engine.add(EngineRequest("a", PROMPT[:4], greedy(9)))
    driver.step()
    driver.engine.abort("a")
    driver.engine.add(EngineRequest("a", PROMPT[4:9], greedy(9)))
    assert driver.finish()["a"].token_ids == llama.hf_greedy(PROMPT[4:9], 9)


def test_who_is_preempted_keeps_the_token_that_is_pending(llama, monkeypatch):
    driver = Driver(make_engine(llama, num_blocks=18, async_scheduling=True))
    preempted_with_a_token_pending = []
    preempt = driver.engine._scheduler._preempt

    def watched(seq):
        preempted_with_a_token_pending.append(seq.num_pending_tokens == 1)
        preempt(seq)

    monkeypatch.setattr(driver.engine._scheduler, "_preempt", watched)
    for seq_id, prompt in (("a", PROMPT), ("b", PROMPT[::-1])):
        driver.engine.add(EngineRequest(seq_id, prompt, greedy()))
    results = driver.finish()
    assert any(preempted_with_a_token_pending)
    assert results["a"].token_ids == llama.hf_greedy(PROMPT, 24)
    assert results["b"].token_ids == llama.hf_greedy(PROMPT[::-1], 24)


@pytest.mark.parametrize("num_failures", [1, 2])
@pytest.mark.parametrize("half", ["forward", "sample"])
def test_a_launch_that_fails_costs_nothing_of_the_step_on_its_way(
    driver, llama, monkeypatch, half, num_failures
):
    for seq_id in "ab":
        driver.engine.add(EngineRequest(seq_id, PROMPT[:4], greedy(9)))
    driver.step()
    failures, compute = iter(range(num_failures)), getattr(driver.engine._runner, half)

    def failing(step):
        if next(failures, None) is not None:
            raise RuntimeError("out of memory")
        return compute(step)

    monkeypatch.setattr(driver.engine._runner, half, failing)
    outputs = driver.step()
    assert [len(output.token_ids) for output in outputs] == [1, 1], "those of the step on its way"
    for _ in range(num_failures):  # nothing is on its way now: the engine has nothing else to give
        with pytest.raises(RuntimeError, match="out of memory"):
            driver.step()
        driver.engine.check_integrity()
    results = driver.finish()
    assert results["a"].token_ids == results["b"].token_ids == llama.hf_greedy(PROMPT[:4], 9)


@pytest.mark.parametrize("is_async", [False, True], ids=["a step at a time", "a step ahead"])
def test_a_step_that_is_lost_on_the_device_breaks_the_engine(llama, monkeypatch, is_async):
    """Its tokens are not to be had any more: going on would leave a gap."""
    driver = Driver(make_engine(llama, async_scheduling=is_async))
    driver.engine.add(EngineRequest("a", PROMPT[:4], greedy(9)))
    driver.step()
    with monkeypatch.context() as patch:
        patch.setattr("ingine.engine.run.model_runner.StepResult.wait", lambda self: 1 / 0)
        with pytest.raises(EngineError, match="lost in flight: ZeroDivisionError"):
            driver.step()
    for _ in range(3):
        with pytest.raises(EngineError, match="lost in flight"):
            driver.engine.step()


def test_a_rank_that_is_gone_is_not_waited_for(driver, monkeypatch):
    driver.engine.add(EngineRequest("a", PROMPT[:4], greedy(9)))
    driver.step()

    def gone(*_):
        raise EngineError("another rank is gone")

    monkeypatch.setattr(driver.engine._runner, "forward", gone)
    monkeypatch.setattr(
        "ingine.engine.run.model_runner.StepResult.wait", lambda self: pytest.fail("it may hang")
    )
    with pytest.raises(EngineError, match="another rank is gone"):
        driver.step()


def test_one_that_is_about_to_end_keeps_no_other_waiting(llama):
    """Its place in the batch is free as soon as its last token is on its way."""
    driver = Driver(make_engine(llama, async_scheduling=True, max_num_seqs=1))
    for seq_id in "ab":
        driver.engine.add(EngineRequest(seq_id, PROMPT[:4], greedy(2)))
    for _ in range(3):
        driver.step()
    assert driver.engine.running_seq_ids == ["b"]
    assert len(driver.results["a"].token_ids) == 2
    assert driver.finish()["b"].token_ids == llama.hf_greedy(PROMPT[:4], 2)


def test_a_step_alone_gives_first_what_is_on_its_way(driver, llama):
    for seq_id in "ab":
        driver.engine.add(EngineRequest(seq_id, PROMPT[:4], greedy(9)))
    driver.step()
    for seq_ids in ({"a", "b"}, {"b"}):
        outputs = driver.engine.step(alone="b")
        assert {output.seq_id for output in outputs} == seq_ids
        for output in outputs:
            driver.results.setdefault(output.seq_id, Result()).take(output)
    results = driver.finish()
    assert results["a"].token_ids == results["b"].token_ids == llama.hf_greedy(PROMPT[:4], 9)


def test_speculation_needs_each_token_before_the_next_step():
    with pytest.raises(ConfigError, match="exclude each other"):
        EngineConfig("tiny", async_scheduling=True, speculation="ngram")


@needs_interpreter
def test_nothing_waits_for_the_device_before_the_tokens_are_taken(llama, monkeypatch):
    """The test uses a GPU's kernels, every parameter, and an interpreter that refuses to wait."""
    short = {name: params.model_copy(update={"max_tokens": 4}) for name, params in PARAMS.items()}
    expected = {name: run_one(make_engine(llama), PROMPT, params) for name, params in short.items()}
    decoder = load_model(llama.path, dtype=torch.float32, device=CPU, kernels=triton_kernels())
    model = LoadedModel(llama.path, decoder, llama.tokenizer, llama.hf_model)
    driver = Driver(make_engine(model, async_scheduling=True, max_num_seqs=6, max_num_batched_tokens=64))
    for half in ("forward", "sample"):
        compute = getattr(driver.engine._runner, half)
        monkeypatch.setattr(driver.engine._runner, half, partial(capture, compute))
    for name, params in short.items():
        driver.engine.add(EngineRequest(name, PROMPT, params))
    for name, result in driver.finish().items():
        assert result.token_ids == expected[name].token_ids, name
        assert len(result.logprobs) == len(expected[name].logprobs)
