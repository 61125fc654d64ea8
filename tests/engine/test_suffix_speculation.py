"""Speculation by suffix in an engine: the same tokens, whatever was said before, and to whom it was said."""

import random

import pytest

from ingine.engine.engine import Engine
from ingine.engine.outputs import FinishReason
from ingine.engine.request import EngineRequest
from ingine.engine.schedule.speculation import Speculator
from ingine.sampling_params import SamplingParams
from tests.engine.conftest import LoadedModel
from tests.engine.driving import Driver, greedy, make_engine, run_one
from tests.engine.test_equality import ARCHITECTURES, MAX_TOKENS, MIXES, PROMPTS, random_mix
from tests.engine.test_resume import PARAMS, PROMPT
from tests.engine.test_speculation import assert_same, assert_some_were_accepted

OTHER_PROMPT = [*reversed(PROMPT)]

FEW_TOKENS = {token_id: 12.0 for token_id in range(65, 69)}
"""A bias towards four of all tokens: outputs resemble each other, and are not all alike."""


@pytest.fixture(autouse=True)
def drafting_at_any_cost(monkeypatch) -> None:
    """Draft always: the decision otherwise depends on measured times."""
    monkeypatch.setattr(Speculator, "_limits", lambda self, num_seqs: (0.05, 8))


def make_suffix_engine(model: LoadedModel, **options) -> Engine:
    return make_engine(model, speculation="suffix", **options)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES.keys())
def test_every_mix_gives_the_tokens_of_transformers(llama, mix):
    """Twice in one engine, so that the second time the history has all of it."""
    expected = [llama.hf_greedy(prompt, MAX_TOKENS) for prompt in PROMPTS]
    engine = make_suffix_engine(llama, **mix)
    for _ in range(2):
        before, driver = engine.stats(), Driver(engine)
        for index, prompt in enumerate(PROMPTS):
            engine.add(EngineRequest(str(index), prompt, greedy(MAX_TOKENS)))
            driver.step()
        results = driver.finish()
        assert [results[str(i)].token_ids for i in range(len(PROMPTS))] == expected
    if mix.get("max_num_batched_tokens") != 1:  # a draft is what the budget has left
        assert engine.stats().num_accepted_tokens > before.num_accepted_tokens


def test_every_kind_of_sampling_draws_the_same_with_all_of_it_in_the_history(llama):
    alone = {name: run_one(make_engine(llama), PROMPT, params) for name, params in PARAMS.items()}
    for options in ({"max_num_seqs": 1}, {"max_num_seqs": 6, "max_num_batched_tokens": 40}):
        engine = make_suffix_engine(llama, **options)
        for _ in range(2):
            driver = Driver(engine)
            for name, params in PARAMS.items():
                engine.add(EngineRequest(name, PROMPT, params))
            for name, result in driver.finish().items():
                assert_same(result, alone[name])
        assert_some_were_accepted(engine)


def test_what_repeats_itself_is_drafted_greedy_and_random(llama):
    for params in (
        greedy(60, logit_bias=FEW_TOKENS),
        SamplingParams(max_tokens=60, seed=1, logit_bias=FEW_TOKENS),
    ):
        expected = run_one(make_engine(llama), PROMPT, params)
        engine = make_suffix_engine(llama)
        assert_same(run_one(engine, PROMPT, params), expected)
        assert_some_were_accepted(engine)


def test_resumed_at_every_position(llama):
    for params in (PARAMS["greedy"], PARAMS["penalties"]):
        whole = run_one(make_engine(llama), PROMPT, params).token_ids
        engine = make_suffix_engine(llama, block_size=1)
        for position in range(len(whole)):
            rest = run_one(engine, PROMPT, params, output_token_ids=whole[:position])
            assert whole[:position] + rest.token_ids == whole
        assert engine.stats().num_accepted_tokens > len(whole)


@pytest.mark.parametrize("seed", range(4))
def test_random_mixes_with_aborts_and_resumptions(tiny, seed):
    """There are three tenants. Aborted outputs serve as drafts when a request comes back."""
    rng = random.Random(seed)
    model = tiny(ARCHITECTURES[seed % len(ARCHITECTURES)])
    params = [PARAMS[rng.choice(list(PARAMS))] for _ in PROMPTS]
    expected = {
        str(i): run_one(make_engine(model), prompt, params[i]).token_ids for i, prompt in enumerate(PROMPTS)
    }
    max_cached_tokens = rng.choice([0, 40, 10_000])

    def new_driver() -> Driver:
        options = random_mix(rng) | {"suffix_decoding_max_cached_tokens": max_cached_tokens}
        return Driver(make_suffix_engine(model, **options))

    driver = new_driver()
    output: dict[str, list[int]] = {seq_id: [] for seq_id in expected}
    waiting, running = list(expected), []
    while waiting or running:
        event = rng.random()
        if waiting and event < 0.5:
            seq_id = waiting.pop(rng.randrange(len(waiting)))
            if rng.random() < 0.1:
                output[seq_id] = []  # what it had was lost; the history may have it
            index, tenant = int(seq_id), rng.choice(["", "a", "b"])
            driver.engine.add(
                EngineRequest(
                    seq_id, PROMPTS[index], params[index], output_token_ids=output[seq_id], tenant=tenant
                )
            )
            running.append(seq_id)
        elif running and event < 0.56:
            seq_id = running.pop(rng.randrange(len(running)))
            driver.engine.abort(seq_id)
            waiting.append(seq_id)
        elif event < 0.58:
            driver = new_driver()
            waiting, running = waiting + running, []
        for step_output in driver.step():
            output[step_output.seq_id] += step_output.token_ids
            if step_output.finish_reason:
                running.remove(step_output.seq_id)
    assert output == expected


# --------------------------------------------------------------------------------- whose outputs


def num_steps(engine: Engine, tenant: str, prompt: list[int] = PROMPT) -> int:
    """The number of steps of a greedy output."""
    engine.add(EngineRequest("one", prompt, greedy(MAX_TOKENS), tenant=tenant))
    driver, steps = Driver(engine), 0
    while engine.has_unfinished:
        driver.step()
        steps += 1
    return steps


def test_an_output_speeds_up_the_same_tenant_s_next_one_and_nobody_else_s(llama):
    engine = make_suffix_engine(llama, enable_prefix_caching=False)
    new = num_steps(engine, "a")
    assert num_steps(engine, "b") == num_steps(engine, "") == new
    assert num_steps(engine, "a") < new
    assert num_steps(engine, "b") == num_steps(engine, "") < new, "by now they have outputs of their own"

    shared = make_suffix_engine(llama, suffix_decoding_across_tenants=True)
    assert num_steps(shared, "a") == new > num_steps(shared, "b")


def test_with_room_for_none_no_output_is_remembered(llama):
    engine = make_suffix_engine(llama, suffix_decoding_max_cached_tokens=0, enable_prefix_caching=False)
    assert num_steps(engine, "a") == num_steps(engine, "a")


def test_prompts_are_nobody_s_output(llama):
    output = run_one(make_engine(llama), OTHER_PROMPT, greedy(MAX_TOKENS)).token_ids
    new = num_steps(make_suffix_engine(llama), "", OTHER_PROMPT)
    engine = make_suffix_engine(llama)
    run_one(engine, output, greedy(1))
    assert num_steps(engine, "", OTHER_PROMPT) == new


def test_what_an_aborted_sequence_had_is_drafted_when_it_is_made_again(llama):
    engine = make_suffix_engine(llama, enable_prefix_caching=False)
    engine.add(EngineRequest("one", PROMPT, greedy(MAX_TOKENS)))
    num_tokens = steps = 0
    while num_tokens < MAX_TOKENS - 6:
        num_tokens += sum(len(output.token_ids) for output in engine.step())
        steps += 1
    [output] = engine.abort("one")
    assert output.finish_reason is FinishReason.ABORT
    assert num_steps(engine, "") < steps
