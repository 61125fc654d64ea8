"""Several choices of one request: each is what a lone request generates, and the prompt is computed once."""

import pytest

from ingine.engine.llm import LLM
from ingine.engine.outputs import FinishReason
from ingine.engine.request import EngineRequest
from ingine.errors import InvalidRequest
from ingine.sampling_params import SamplingParams
from tests.engine.driving import Driver, Result, make_engine, run_one

PROMPT = list(range(60, 90))
N = 3
PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=20, n=N),
    "random": SamplingParams(temperature=1.5, seed=2**63 - 2, max_tokens=20, n=N),
    "penalties and logprobs": SamplingParams(
        temperature=1.5, seed=3, repetition_penalty=1.3, presence_penalty=1.0, logprobs=2, max_tokens=20, n=N
    ),
    "ends at different times": SamplingParams(
        temperature=1.5, seed=4, min_tokens=2, stop_token_ids=tuple(range(200)), max_tokens=20, n=N
    ),
}
_lone: dict[tuple, list[Result]] = {}
ASYNC = pytest.mark.parametrize("is_async", [False, True], ids=["a step at a time", "a step ahead"])


def lone(llama, params: SamplingParams, prompt=PROMPT) -> list[Result]:
    """What requests of one choice with the choices' seeds generate, each in an engine of its own."""
    key = params.model_dump_json(), tuple(prompt)
    if key not in _lone:
        seeds = [None if params.seed is None else (params.seed + index) % 2**63 for index in range(params.n)]
        each = [params.model_copy(update={"n": 1, "seed": seed}) for seed in seeds]
        _lone[key] = [run_one(make_engine(llama), prompt, one) for one in each]
    return _lone[key]


def names(seq_id: str, n: int = N) -> list[str]:
    return [seq_id, *(f"{seq_id}/{index}" for index in range(1, n))]


def assert_same(results: list[Result], expected: list[Result]) -> None:
    assert len(results) == len(expected)
    for result, right in zip(results, expected, strict=True):
        assert result.token_ids == right.token_ids
        assert result.text == right.text
        assert (result.finish_reason, result.stop_reason) == (right.finish_reason, right.stop_reason)
        assert [entry["token_id"] for entry in result.logprobs] == [e["token_id"] for e in right.logprobs]


def computed(driver: Driver) -> int:
    """Run the engine to the end. Returns the number of tokens that its steps compute."""
    num_computed, forward = 0, driver.engine._runner.forward

    def counted(batch):
        nonlocal num_computed
        num_computed += sum(batch.num_tokens)
        return forward(batch)

    driver.engine._runner.forward = counted
    driver.finish()
    return num_computed


OPTIONS = {
    "alone": {},
    "chunked prefill": {"max_num_batched_tokens": 7},
    "without prefix caching": {"enable_prefix_caching": False},
    "in turns": {"max_num_seqs": 1},
    "two at a time": {"max_num_seqs": 2, "enable_prefix_caching": False},
    "short of memory": {"num_blocks": 20},
    "short of memory without prefix caching": {"num_blocks": 20, "enable_prefix_caching": False},
}


@ASYNC
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_each_choice_is_what_a_lone_request_generates(llama, params, options, is_async):
    driver = Driver(make_engine(llama, async_scheduling=is_async, **options))
    driver.engine.add(EngineRequest("a", PROMPT, params))
    results = driver.finish()
    assert_same([results[name] for name in names("a")], lone(llama, params))
    if "num_blocks" in options and params is PARAMS["greedy"]:
        assert driver.engine.stats().num_preemptions > 0


@ASYNC
@pytest.mark.parametrize("caches", [True, False], ids=["prefix caching", "no prefix caching"])
def test_choices_in_a_mix_short_of_memory(llama, is_async, caches):
    options = {"max_num_seqs": 6, "max_num_batched_tokens": 11, "num_blocks": 40}
    driver = Driver(make_engine(llama, async_scheduling=is_async, enable_prefix_caching=caches, **options))
    for name, params in PARAMS.items():
        driver.engine.add(EngineRequest(name, PROMPT, params))
        driver.engine.add(EngineRequest(f"one {name}", PROMPT[::-1], params.model_copy(update={"n": 1})))
        driver.step()
    results = driver.finish()
    assert driver.engine.stats().num_preemptions > 0
    for name, params in PARAMS.items():
        assert_same([results[each] for each in names(name)], lone(llama, params))
        one = params.model_copy(update={"n": 1})
        assert_same([results[f"one {name}"]], lone(llama, one, PROMPT[::-1]))


@ASYNC
@pytest.mark.parametrize("caches", [True, False], ids=["prefix caching", "no prefix caching"])
@pytest.mark.parametrize("budget", [64, 2048], ids=["chunked", "at once"])
def test_eight_choices_compute_a_prompt_of_400_tokens_once(llama, is_async, caches, budget):
    engine = make_engine(
        llama,
        block_size=16,
        max_model_len=512,
        max_num_seqs=8,
        max_num_batched_tokens=budget,
        async_scheduling=is_async,
        enable_prefix_caching=caches,
    )
    driver = Driver(engine)
    prompt = [3 + number % 250 for number in range(400)]
    driver.engine.add(
        EngineRequest(
            "a", prompt, SamplingParams(temperature=1.0, seed=1, max_tokens=4, ignore_eos=True, n=8)
        )
    )
    # Each other choice computes the last 16 tokens, since it needs the logits of the last one.
    assert computed(driver) == 400 + 7 * 16 + 8 * 3
    assert engine.stats().num_prompt_tokens == 400


def test_without_prefix_caching_no_other_request_finds_the_prompt(llama):
    driver = Driver(make_engine(llama, enable_prefix_caching=False))
    for name in ("a", "b"):
        driver.engine.add(EngineRequest(name, PROMPT, PARAMS["random"]))
    results = driver.finish()
    assert (results["a"].num_cached_tokens, results["b"].num_cached_tokens) == (0, 0)
    assert results["a/1"].num_cached_tokens == 28


def test_choices_that_wait_for_the_prompt_hold_up_no_other_request(llama):
    driver = Driver(make_engine(llama, max_num_batched_tokens=20, max_num_seqs=8))
    driver.engine.add(EngineRequest("long", PROMPT, PARAMS["random"]))
    driver.engine.add(EngineRequest("short", PROMPT[:3], PARAMS["greedy"].model_copy(update={"n": 1})))
    driver.step()
    assert driver.engine.running_seq_ids == ["long"]
    driver.step()  # the rest of the long prompt leaves room for the short one, and not for a choice
    assert set(driver.results) == {"long", "short"}


@ASYNC
@pytest.mark.parametrize("name", ["random", "ends at different times"])
def test_resumes_at_every_position(llama, name, is_async):
    params = PARAMS[name].model_copy(update={"max_tokens": 7})
    whole = Driver(make_engine(llama, async_scheduling=is_async))
    order: list[tuple[int, int]] = []
    whole.engine.add(EngineRequest("a", PROMPT, params))
    while whole.engine.has_unfinished:
        order += [(output.index, token_id) for output in whole.step() for token_id in output.token_ids]
    expected = [whole.results[each] for each in names("a")]
    engine = make_engine(llama, async_scheduling=is_async)
    for position in range(len(order) + 1):
        first, *others = [[token for index, token in order[:position] if index == i] for i in range(N)]
        driver = Driver(engine)
        request = EngineRequest("a", PROMPT, params, output_token_ids=first, other_output_token_ids=others)
        driver.engine.add(request)
        results = driver.finish()
        for index, right in enumerate(expected):
            rest = results[names("a")[index]]
            assert [first, *others][index] + rest.token_ids == right.token_ids
            assert (rest.finish_reason, rest.stop_reason) == (right.finish_reason, right.stop_reason)
            assert rest.final_text == right.final_text


def test_a_choice_that_has_ended_stays_ended(llama):
    params = SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, n=2)
    request = EngineRequest(
        "a", PROMPT, params, output_token_ids=[65] * 4, other_output_token_ids=[[66]], ended_choices=[0]
    )
    driver = Driver(make_engine(llama))
    driver.engine.add(request)
    results = driver.finish()
    assert (results["a"].token_ids, results["a"].finish_reason) == ([], "length")
    assert len(results["a/1"].token_ids) == 8


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_an_abort_ends_all_choices(llama, num_steps):
    driver = Driver(make_engine(llama, max_num_batched_tokens=16))
    driver.engine.add(EngineRequest("a", PROMPT, PARAMS["random"]))
    driver.engine.add(EngineRequest("b", PROMPT[::-1], PARAMS["greedy"]))
    for _ in range(num_steps):
        driver.step()
    outputs = driver.engine.abort("a")
    driver.engine.check_integrity()
    assert [output.index for output in outputs] == [0, 1, 2]
    assert [output.ends_request for output in outputs] == [False, False, True]
    assert {output.finish_reason for output in outputs} == {FinishReason.ABORT}
    results = driver.finish()
    assert_same([results[name] for name in names("b")], lone(llama, PARAMS["greedy"], PROMPT[::-1]))


@ASYNC
def test_only_the_last_output_ends_the_request(llama, is_async):
    driver = Driver(make_engine(llama, async_scheduling=is_async))
    driver.engine.add(EngineRequest("a", PROMPT, PARAMS["ends at different times"]))
    outputs = []
    while driver.engine.has_unfinished:
        outputs += driver.step()
    assert [output.ends_request for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert len({result.positions[-1] for result in driver.results.values()}) > 1


def test_a_choice_that_fails_ends_the_others(llama, monkeypatch):
    driver = Driver(make_engine(llama))
    driver.engine.add(EngineRequest("a", PROMPT, PARAMS["random"]))
    while len(driver.results) < N:
        driver.step()
    [sick] = [seq for seq in driver.engine._scheduler.running if seq.index == 1]
    wait = driver.engine._wait

    def with_a_fault(step):
        sampled = wait(step)
        for seq, tokens in sampled:
            if seq is sick:
                tokens[0] = tokens[0]._replace(token_id=None)
        return sampled

    monkeypatch.setattr(driver.engine, "_wait", with_a_fault)
    outputs = driver.step()
    assert not driver.engine.has_unfinished
    assert (outputs[-1].index, outputs[-1].finish_reason, outputs[-1].ends_request) == (1, "error", True)
    assert [driver.results[name].finish_reason for name in names("a")] == ["abort", "error", "abort"]


def test_a_failed_batch_is_tried_one_request_at_a_time(llama):
    driver = Driver(make_engine(llama, max_num_batched_tokens=64, max_num_seqs=8))
    for name in ("a", "b"):
        driver.engine.add(EngineRequest(name, PROMPT, PARAMS["random"]))
    for _ in range(4):
        driver.step()
    assert driver.engine.running_seq_ids == ["a", "b"]
    outputs = driver.engine.step(alone="b")
    driver.engine.check_integrity()
    assert sorted((output.seq_id, output.index) for output in outputs) == [("b", 0), ("b", 1), ("b", 2)]


@pytest.mark.parametrize("speculation", ["ngram", "suffix"])
def test_choices_with_drafts(llama, speculation):
    params = PARAMS["greedy"]
    driver = Driver(make_engine(llama, speculation=speculation))
    driver.engine.add(EngineRequest("a", PROMPT, params))
    results = driver.finish()
    assert_same([results[name] for name in names("a")], lone(llama, params))


def test_llm_returns_all_choices(llama):
    llm = LLM(str(llama.path), dtype="float32", device="cpu")
    params = SamplingParams(temperature=1.5, seed=7, max_tokens=12, n=N)
    [request] = llm.generate([PROMPT], params, use_tqdm=False)
    assert [output.index for output in request.outputs] == [0, 1, 2]
    assert [output.token_ids for output in request.outputs] == [r.token_ids for r in lone(llama, params)]
    assert len({tuple(output.token_ids) for output in request.outputs}) == N
    assert all(output.finish_reason == "length" for output in request.outputs) and request.finished
    assert request.usage == {"num_prompt_tokens": 30, "num_cached_tokens": 0, "num_output_tokens": 36}


def test_more_choices_than_the_engine_takes_are_refused(llama):
    llm = LLM(str(llama.path), dtype="float32", device="cpu", max_choices=2)
    with pytest.raises(InvalidRequest, match="n: 3 is over max_choices, which is 2"):
        llm.generate([PROMPT], SamplingParams(n=3), use_tqdm=False)
