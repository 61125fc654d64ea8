"""Engine.add, abort and step: limits, failures and what is refused."""

import logging

import pytest
import torch

from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.request import EngineRequest
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import EngineError, InvalidRequest
from ingine.sampling_params import SamplingParams
from tests.engine.conftest import LoadedModel, load
from tests.engine.driving import Driver, greedy, make_engine, run_one
from tests.tiny_models import EOS_TOKEN_ID, make_tiny_model, make_tokenizer

PROMPT = list(range(60, 90))


# ---------------------------------------------------------------------------------------------- ends


def test_max_tokens_ends_it(llama):
    result = run_one(make_engine(llama), PROMPT, greedy(5))
    assert len(result.token_ids) == 5 and result.finish_reason == "length"


def test_the_longest_sequence_ends_it(llama):
    result = run_one(make_engine(llama, max_model_len=40), PROMPT, greedy(500))
    assert len(result.token_ids) == 10 and result.finish_reason == "length"


def test_all_of_kv_memory_ends_it(llama):
    """Alone, a sequence may use every block; it is not preempted for more than there is."""
    result = run_one(make_engine(llama, num_blocks=9), PROMPT, greedy(500))
    assert len(PROMPT) + len(result.token_ids) == 9 * 4 and result.finish_reason == "length"


def test_end_of_sequence_ends_it_and_is_in_the_ids_but_not_in_the_text(llama):
    params = greedy(5, logit_bias={EOS_TOKEN_ID: 100.0})
    result = run_one(make_engine(llama), PROMPT, params)
    assert (result.token_ids, result.text) == ([EOS_TOKEN_ID], "")
    assert (result.finish_reason, result.stop_reason) == ("stop", None)


def test_end_of_sequence_is_what_config_or_tokenizer_call_so(llama):
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|endoftext|>"
    [of_tokenizer] = Tokenizer.from_transformers(tokenizer).eos_token_ids
    assert of_tokenizer != EOS_TOKEN_ID
    config = EngineConfig("tiny", dtype="float32", max_num_seqs=1, max_model_len=160)
    engine = Engine(config, model=llama.decoder, tokenizer=Tokenizer.from_transformers(tokenizer))
    for token_id in (of_tokenizer, EOS_TOKEN_ID):
        assert run_one(engine, PROMPT, greedy(5, logit_bias={token_id: 100.0})).token_ids == [token_id]


def test_ignore_eos_goes_on(llama):
    result = run_one(make_engine(llama), PROMPT, greedy(5, logit_bias={EOS_TOKEN_ID: 100.0}, ignore_eos=True))
    assert result.token_ids == [EOS_TOKEN_ID] * 5 and result.finish_reason == "length"


def test_min_tokens_come_before_end_of_sequence(llama):
    result = run_one(make_engine(llama), PROMPT, greedy(9, logit_bias={EOS_TOKEN_ID: 100.0}, min_tokens=3))
    assert len(result.token_ids) == 4 and result.token_ids[-1] == EOS_TOKEN_ID


def test_a_stop_token_names_itself_and_has_no_text(llama):
    [letter] = llama.tokenizer.encode("x")
    result = run_one(
        make_engine(llama), PROMPT, greedy(5, logit_bias={letter: 100.0}, stop_token_ids=(letter,))
    )
    assert (result.token_ids, result.text, result.stop_reason) == ([letter], "", letter)


def test_a_stop_string_is_not_looked_for_in_the_first_min_tokens(llama):
    [letter] = llama.tokenizer.encode("x")
    params = greedy(9, logit_bias={letter: 100.0}, stop=("xx",), min_tokens=3)
    result = run_one(make_engine(llama), PROMPT, params)
    assert (len(result.token_ids), result.text, result.stop_reason) == (5, "xxx", "xx")


# --------------------------------------------------------------------------------------------- abort


@pytest.mark.parametrize("num_steps", [0, 1, 4], ids=["waiting", "prefilling", "running"])
def test_abort_at_any_time(llama, num_steps):
    driver = Driver(make_engine(llama, max_num_batched_tokens=16))
    driver.engine.add(EngineRequest("gone", PROMPT, greedy()))
    driver.engine.add(EngineRequest("stays", PROMPT[::-1], greedy()))
    for _ in range(num_steps):
        driver.step()
    [output] = driver.engine.abort("gone")
    driver.engine.check_integrity()
    assert (output.finish_reason, output.token_ids) == ("abort", [])
    assert driver.finish()["stays"].token_ids == llama.hf_greedy(PROMPT[::-1], 24)


def test_abort_while_preempted(llama):
    driver = Driver(make_engine(llama, num_blocks=18, max_num_seqs=3))
    driver.engine.add(EngineRequest("first", PROMPT, greedy()))
    driver.engine.add(EngineRequest("second", PROMPT[::-1], greedy()))
    while driver.engine.stats().num_preemptions == 0:
        driver.step()
    [output] = driver.engine.abort("second")
    assert output.position == len(driver.results["second"].token_ids) > 0
    assert driver.finish()["first"].token_ids == llama.hf_greedy(PROMPT, 24)


def test_abort_returns_the_text_that_was_held_back(llama):
    [letter] = llama.tokenizer.encode("x")
    driver = Driver(make_engine(llama))
    driver.engine.add(EngineRequest("one", PROMPT[:4], greedy(9, logit_bias={letter: 100.0}, stop=("xxx",))))
    driver.step()
    driver.step()
    assert driver.results["one"].text == ""
    [output] = driver.engine.abort("one")
    assert output.final_text == "xx"


def test_abort_of_what_is_not_there(llama):
    assert make_engine(llama).abort("nobody") == []


# ------------------------------------------------------------------------------------------ failures


class FailingModel:
    """The real model, broken on demand."""

    def __init__(self, decoder):
        self._decoder = decoder
        self.fails = False
        self.nan_rows: list[int] = []

    def __getattr__(self, name):
        return getattr(self._decoder, name)

    def forward(self, *args):
        if self.fails:
            raise RuntimeError("out of memory")
        return self._decoder.forward(*args)

    def compute_logits(self, hidden):
        logits = self._decoder.compute_logits(hidden)
        logits[self.nan_rows] = torch.nan
        return logits


@pytest.fixture
def failing(llama) -> tuple[FailingModel, Driver]:
    model = FailingModel(llama.decoder)
    config = EngineConfig(
        "tiny", dtype="float32", block_size=4, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=160
    )
    return model, Driver(Engine(config, model=model, tokenizer=llama.tokenizer))


@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_a_step_that_fails_counts_for_nothing_and_can_be_tried_again(llama, failing, num_steps):
    model, driver = failing
    for seq_id in ("a", "b"):
        driver.engine.add(EngineRequest(seq_id, PROMPT, greedy()))
    for _ in range(num_steps):
        driver.step()
    model.fails = True
    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            driver.step()
        driver.engine.check_integrity()
    model.fails = False
    results = driver.finish()
    assert results["a"].token_ids == results["b"].token_ids == llama.hf_greedy(PROMPT, 24)


def test_after_a_step_that_fails_its_sequences_can_be_given_up(llama, failing):
    model, driver = failing
    for seq_id in "abcdef":
        driver.engine.add(EngineRequest(seq_id, PROMPT, greedy()))
    driver.step()
    model.fails = True
    with pytest.raises(RuntimeError):
        driver.step()
    model.fails = False
    given_up = driver.engine.running_seq_ids
    for seq_id in given_up:
        [output] = driver.engine.abort(seq_id)
        assert output.finish_reason == "abort"
    results = driver.finish()
    assert set(results) == set("abcdef") - set(given_up)
    assert all(result.token_ids == llama.hf_greedy(PROMPT, 24) for result in results.values())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_of_nan_end_their_own_sequence_only(llama, failing, temperature):
    model, driver = failing
    driver.engine.add(
        EngineRequest("sick", PROMPT[:4], SamplingParams(temperature=temperature, max_tokens=9, logprobs=1))
    )
    driver.engine.add(EngineRequest("well", PROMPT[:5], greedy(9)))
    driver.step()
    model.nan_rows = [0]
    driver.step()
    model.nan_rows = []
    results = driver.finish()
    assert (results["sick"].finish_reason, len(results["sick"].token_ids)) == ("error", 1)
    assert "finite" in results["sick"].stop_reason
    assert results["well"].token_ids == llama.hf_greedy(PROMPT[:5], 9)


POISON = 50
"""A token whose embedding is NaN, and with it all KV of those that have it from there on."""


@pytest.fixture
def poisoned(tmp_path) -> LoadedModel:
    model = load(make_tiny_model(tmp_path))
    model.decoder.embed_tokens[POISON] = torch.nan
    return model


@pytest.mark.parametrize("block_size", [4, 16])
@pytest.mark.parametrize("is_aborted", [False, True], ids=["found out", "aborted in mid-prefill"])
def test_nan_in_the_kv_of_a_sequence_reaches_no_other(poisoned, is_aborted, block_size):
    """Neither in the batch nor later, from blocks that the sick one had: memory is short, all are reused."""
    sick = [POISON, *PROMPT]
    expected = [poisoned.hf_greedy(PROMPT[:length], 9) for length in (3, 9, 26)]
    num_blocks = 128 // block_size
    driver = Driver(make_engine(poisoned, num_blocks=num_blocks, block_size=block_size, max_num_seqs=8))
    for attempt in "123":
        driver.engine.add(EngineRequest(f"sick {attempt}", sick, greedy(9)))
        for index, length in enumerate((3, 9, 26)):
            driver.engine.add(EngineRequest(f"well {attempt} {index}", PROMPT[:length], greedy(9)))
        driver.step()
        if is_aborted:
            driver.engine.abort(f"sick {attempt}")
        results = driver.finish()
        assert is_aborted or results[f"sick {attempt}"].finish_reason == "error"
        assert [results[f"well {attempt} {index}"].token_ids for index in range(3)] == expected


def test_blocks_of_a_sequence_that_failed_are_not_shared(poisoned, llama):
    """The cause of the NaN may have been transient, so the next attempt computes everything again."""
    engine = make_engine(poisoned)
    prompt = [*PROMPT, POISON, *PROMPT]
    assert run_one(engine, prompt, greedy(9)).finish_reason == "error"
    poisoned.decoder.embed_tokens[POISON] = llama.decoder.embed_tokens[POISON]
    result = run_one(engine, prompt, greedy(9))
    assert (result.num_cached_tokens, result.token_ids) == (0, llama.hf_greedy(prompt, 9))


def test_check_integrity_notices(llama):
    driver = Driver(make_engine(llama))
    driver.engine.add(EngineRequest("one", PROMPT, greedy()))
    driver.step()
    driver.engine._blocks.ref_counts[0] += 1
    with pytest.raises(EngineError, match="block 0 "):
        driver.engine.check_integrity()


# ---------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("prompt", "params", "code", "says"),
    [
        ([], {}, "empty_prompt", "no tokens"),
        (
            [1] * 200,
            {},
            "prompt_too_long",
            r"200 tokens; the most is 159 \(max_model_len is 160, all KV blocks",
        ),
        ([1, 259], {}, "invalid_token_id", "259 is not a token id; the vocabulary has 259"),
        ([1, -1], {}, "invalid_token_id", "-1 is not a token id"),
        ([1, 2**70], {}, "invalid_token_id", "ints"),
        ([1, 2.0], {}, "invalid_token_id", "ints"),
        ([1, "2"], {}, "invalid_token_id", "ints"),
        ([1], {"stop_token_ids": (1000,)}, "invalid_parameter", "stop_token_ids: 1000"),
        ([1], {"logit_bias": {1000: 1.0}}, "invalid_parameter", "logit_bias: 1000"),
    ],
)
def test_what_can_never_run_is_refused(llama, prompt, params, code, says):
    with pytest.raises(InvalidRequest, match=says) as error:
        make_engine(llama).limits.validate(prompt, SamplingParams(**params))
    assert error.value.code == code


def test_a_prompt_that_memory_cannot_hold_is_refused_with_both_limits(llama):
    with pytest.raises(
        InvalidRequest, match=r"the most is 19 \(max_model_len is 160, all KV blocks hold 20\)"
    ):
        make_engine(llama, num_blocks=5).limits.validate(PROMPT, greedy())


def test_output_tokens_are_checked_too(llama):
    with pytest.raises(InvalidRequest, match="the output so far: 300"):
        make_engine(llama).limits.validate_output([300])


def test_an_id_in_use_is_refused(llama):
    engine = make_engine(llama)
    engine.add(EngineRequest("one", PROMPT, greedy()))
    with pytest.raises(InvalidRequest, match="'one'") as error:
        engine.add(EngineRequest("one", PROMPT, greedy()))
    assert error.value.code == "duplicate_id"


def test_params_of_another_type_are_refused(llama):
    with pytest.raises(InvalidRequest, match="not dict"):
        make_engine(llama).limits.validate(PROMPT, {"temperature": 0})


# -------------------------------------------------------------------------------------------- others


def test_without_a_tokenizer_there_are_tokens_and_no_text(llama):
    config = EngineConfig("tiny", dtype="float32", max_num_seqs=1, max_model_len=160)
    result = run_one(Engine(config, model=llama.decoder), PROMPT, greedy())
    assert (result.token_ids, result.text) == (llama.hf_greedy(PROMPT, 24), "")


def test_requests_without_a_seed_differ_and_the_config_s_seed_repeats_them(llama):
    params = SamplingParams(temperature=2.0, max_tokens=16)

    def two(seed: int) -> list[list[int]]:
        engine = make_engine(llama, seed=seed)
        return [run_one(engine, PROMPT, params).token_ids for _ in range(2)]

    first, second = two(0)
    assert first != second
    assert two(0) == [first, second]
    assert two(1)[0] != first


def test_stats_count_tokens_and_blocks(llama):
    driver = Driver(make_engine(llama, num_blocks=40, max_num_seqs=1))
    driver.engine.add(EngineRequest("a", PROMPT, greedy(4)))
    driver.engine.add(EngineRequest("b", PROMPT, greedy(4)))
    driver.step()
    stats = driver.engine.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_blocks, stats.num_free_blocks) == (1, 1, 40, 36)
    assert stats.kv_usage == pytest.approx(0.1)
    driver.finish()
    stats = driver.engine.stats()
    assert (stats.num_prompt_tokens, stats.num_output_tokens) == (60, 8)
    assert (stats.prefix_cache_query_tokens, stats.prefix_cache_hit_tokens) == (60, 28)
    assert (stats.num_running, stats.kv_usage) == (0, 0)


def test_of_the_same_arrival_time_the_first_to_be_added_stays_first(llama):
    """This holds even if it was preempted while the other was waiting."""
    driver = Driver(make_engine(llama, num_blocks=20, max_num_seqs=2))
    for seq_id in "abc":
        driver.engine.add(EngineRequest(seq_id, PROMPT, greedy(), arrival_time=0.0))
    while driver.engine.stats().num_preemptions == 0:
        driver.step()
    assert driver.engine.running_seq_ids == ["a"]
    while len(driver.engine.running_seq_ids) < 2:
        driver.step()
    assert driver.engine.running_seq_ids == ["a", "b"]
    driver.finish()


def test_the_trace_names_who_was_preempted(llama, caplog):
    driver = Driver(make_engine(llama, num_blocks=18))
    driver.engine.add(EngineRequest("first", PROMPT, greedy()))
    driver.engine.add(EngineRequest("second", PROMPT[::-1], greedy()))
    with caplog.at_level(logging.DEBUG, logger="ingine.engine.engine"):
        driver.finish()
    lines = [record.getMessage() for record in caplog.records]
    preempted = next(i for i, line in enumerate(lines) if line.endswith("ms | preempted second"))
    assert lines[preempted].startswith("prefill 0 tok/0 seq | decode 1 | 1 tok")
    assert any(line.endswith("ms | admitted second") for line in lines[preempted:]), "it comes back"


def test_the_trace_has_a_line_a_step(llama, caplog):
    driver = Driver(make_engine(llama, num_blocks=40))
    driver.engine.add(EngineRequest("a", PROMPT, greedy(2)))
    with caplog.at_level(logging.DEBUG, logger="ingine.engine.engine"):
        driver.finish()
    first, second, third = (record.getMessage() for record in caplog.records)
    assert first.startswith("prefill 16 tok/1 seq | decode 0 | 16 tok | blocks 4 used 36 free | ")
    assert first.endswith("ms | admitted a")
    assert second.startswith("prefill 14 tok/1 seq")
    assert third.startswith("prefill 0 tok/0 seq | decode 1 | 1 tok") and third.endswith("finished a:length")
