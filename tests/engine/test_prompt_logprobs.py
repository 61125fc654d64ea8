"""Log probabilities of prompt tokens: those of transformers, however the prompt is computed."""

import pytest
import torch

from ingine.engine.request import EngineRequest
from ingine.errors import InvalidRequest
from ingine.sampling_params import MAX_PROMPT_LOGPROBS, SamplingParams
from tests.engine.conftest import LoadedModel
from tests.engine.driving import Driver, greedy, make_engine, run_one
from tests.engine.test_resume import PARAMS

PROMPT = [*range(60, 90), 5, 61, 62, 63, 61, 62]
NUM_TOP = 3


def scored(max_tokens: int = 4, **fields) -> SamplingParams:
    return greedy(max_tokens, prompt_logprobs=NUM_TOP, **fields)


def expected(model: LoadedModel, prompt: list[int]) -> torch.Tensor:
    """[num_tokens - 1, vocab_size]: the distribution of each prompt token but the first."""
    with torch.inference_mode():
        return model.hf_model(torch.tensor([prompt])).logits[0, :-1].float().log_softmax(-1)


def assert_are_expected(entries: list, prompt: list[int], of_all: torch.Tensor) -> None:
    first, *others = entries
    assert first is None and len(others) == len(prompt) - 1
    for entry, token_id, row in zip(others, prompt[1:], of_all, strict=True):
        assert entry["token_id"] == token_id
        assert entry["logprob"] == pytest.approx(row[token_id].item(), abs=1e-3)
        top = row.topk(NUM_TOP)
        assert [value for _, value in entry["top"]] == pytest.approx(top.values.tolist(), abs=1e-3)
        best, worst = (1 + int((row > row[token_id] + margin).sum()) for margin in (1e-3, -1e-3))
        assert best <= entry["rank"] <= worst
        assert (entry["rank"] == 1) == (entry["top"][0][0] == token_id)


def reports(driver: Driver) -> dict[str, list]:
    """Run to the end. Returns what each sequence reports of its prompt: once, with its first token."""
    found: dict[str, list] = {}
    while driver.engine.has_unfinished:
        for output in driver.step():
            is_first = output.position == len(output.token_ids) > 0
            assert output.prompt_logprobs is None or is_first
            if output.prompt_logprobs is not None:
                found[output.seq_id] = output.prompt_logprobs
    return found


WAYS = {
    "chunks": {},
    "at once": {"max_num_batched_tokens": 64},
    "token by token": {"max_num_batched_tokens": 1, "max_num_seqs": 1},
    "a step ahead": {"async_scheduling": True},
    "short of memory": {"num_blocks": 20},
    "short of memory, a step ahead": {"num_blocks": 20, "async_scheduling": True},
    "drafts": {"speculation": "ngram"},
}


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
def test_they_are_those_of_transformers_in_every_mix(llama, options):
    """Two of equal prompts, which would share blocks, among others that ask for none."""
    driver = Driver(make_engine(llama, **options))
    requests = {"a": (PROMPT, scored(20)), "b": (PROMPT, scored(20)), "c": (PROMPT[3:], scored(logprobs=1))}
    requests |= {name: (PROMPT, params) for name, params in PARAMS.items() if name in ("greedy", "penalties")}
    for name, (prompt, params) in requests.items():
        driver.engine.add(EngineRequest(name, prompt, params))
    found = reports(driver)
    assert found.keys() == {"a", "b", "c"}
    assert driver.engine.stats().num_preemptions or "num_blocks" not in options
    for name, entries in found.items():
        prompt = requests[name][0]
        assert_are_expected(entries, prompt, expected(llama, prompt))
        alone = run_one(make_engine(llama), prompt, greedy(4 if name == "c" else 20))
        assert driver.results[name].token_ids == alone.token_ids


def test_a_prompt_in_the_cache_is_computed_again(llama):
    engine = make_engine(llama)
    run_one(engine, PROMPT, greedy(2))
    driver = Driver(engine)
    engine.add(EngineRequest("again", PROMPT, scored()))
    assert_are_expected(reports(driver)["again"], PROMPT, expected(llama, PROMPT))
    assert driver.results["again"].num_cached_tokens == 0
    assert run_one(engine, PROMPT, greedy(2)).num_cached_tokens > 0


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_preempted_between_two_chunks_a_prompt_has_all_of_them(llama, n, is_async):
    engine = make_engine(llama, async_scheduling=is_async)
    driver = Driver(engine)
    engine.add(EngineRequest("a", PROMPT, scored(n=n)))
    for _ in range(2):
        driver.step()
    [seq] = engine._scheduler.running
    assert 1 < len(seq.prompt_logprobs) < len(PROMPT)
    engine._scheduler._preempt(seq)
    assert_are_expected(reports(driver)["a"], PROMPT, expected(llama, PROMPT))


def test_a_prompt_of_one_token_has_none(llama):
    driver = Driver(make_engine(llama))
    driver.engine.add(EngineRequest("a", [65], scored()))
    assert reports(driver) == {"a": [None]}


def test_what_is_resumed_reports_them_only_if_it_has_no_token_yet(llama):
    whole = run_one(make_engine(llama), PROMPT, scored()).token_ids
    for position in range(len(whole) + 1):
        driver = Driver(make_engine(llama))
        driver.engine.add(EngineRequest("a", PROMPT, scored(), output_token_ids=whole[:position]))
        assert reports(driver).keys() == ({"a"} if position == 0 else set())
        assert whole[:position] + driver.results["a"].token_ids == whole


def test_they_have_texts_also_of_a_special_token(llama):
    prompt = [65, *llama.tokenizer.encode("<|im_end|>a")]
    driver = Driver(make_engine(llama))
    driver.engine.add(EngineRequest("a", prompt, scored()))
    [_, special, letter] = reports(driver)["a"]
    assert (special["decoded_token"], letter["decoded_token"]) == ("<|im_end|>", "a")
    assert bytes(letter["bytes"]) == b"a" and len(letter["top_decoded_tokens"]) == NUM_TOP


def test_their_number_is_limited(llama):
    engine = make_engine(llama)
    most = MAX_PROMPT_LOGPROBS // 21
    limits = engine.limits.__class__(max_model_len=10_000, num_kv_tokens=10_000, vocab_size=100)
    limits.validate([1] * most, SamplingParams(prompt_logprobs=20))
    with pytest.raises(InvalidRequest, match=f"the most is {MAX_PROMPT_LOGPROBS}") as refused:
        limits.validate([1] * (most + 1), SamplingParams(prompt_logprobs=20))
    assert refused.value.code == "invalid_parameter"


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
def test_several_choices_report_them_once(llama, options):
    """With the first token of choice 0, also if the prompt is in the cache."""
    engine = make_engine(llama, **options)
    run_one(engine, PROMPT, greedy(2))
    engine.add(EngineRequest("a", PROMPT, scored(n=3)))
    reporting = []
    while engine.has_unfinished:
        reporting += [output for output in engine.step() if output.prompt_logprobs is not None]
    [output] = reporting
    assert (output.index, output.position) == (0, len(output.token_ids))
    assert_are_expected(output.prompt_logprobs, PROMPT, expected(llama, PROMPT))
