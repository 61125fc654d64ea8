"""A grammar with bad words and allowed tokens: what all of them allow, and the end where nothing is left."""

import re

import pytest

from ingine.engine.outputs import FinishReason
from ingine.engine.request import EngineRequest
from ingine.errors import ErrorCode
from ingine.sampling_params import SamplingParams
from tests.engine.driving import Driver, make_engine, run_one

PROMPT = list(range(60, 90))
MODES = {
    "a step at a time": {},
    "a step ahead": {"async_scheduling": True},
    "drafts": {"speculation": "ngram"},
}
in_each_mode = pytest.mark.parametrize("options", MODES.values(), ids=MODES)
LETTERS = "[a-d]{12,16}"
WORDS = ("ab", "cc", "d")
FREE = SamplingParams(temperature=1.0, seed=7, max_tokens=20, ignore_eos=True)


def constrained(pattern: str, **fields) -> SamplingParams:
    sampling = {"temperature": 1.5, "seed": 3, "max_tokens": 30} | fields
    return SamplingParams(structured_outputs={"regex": pattern}, **sampling)


def finish(driver: Driver) -> dict[str, ErrorCode | None]:
    """Run to the end. Returns each request's error code."""
    codes = {}
    while driver.engine.has_unfinished:
        codes |= {output.seq_id: output.error_code for output in driver.step() if output.finish_reason}
    return codes


@in_each_mode
@pytest.mark.parametrize("seed", range(3))
def test_an_output_obeys_both(llama, options, seed):
    params = constrained(LETTERS, bad_words=WORDS, seed=seed)
    result = run_one(make_engine(llama, **options), PROMPT, params)
    assert result.finish_reason is FinishReason.STOP
    assert re.fullmatch(LETTERS, result.text)
    assert not [word for word in WORDS if word in result.text]
    assert result.token_ids == run_one(make_engine(llama), PROMPT, params).token_ids


@in_each_mode
def test_allowed_tokens_restrict_a_grammar(llama, options):
    allowed = [*llama.tokenizer.encode("xbd"), *llama.tokenizer.eos_token_ids]
    params = constrained(LETTERS, allowed_token_ids=allowed)
    result = run_one(make_engine(llama, **options), PROMPT, params)
    assert result.finish_reason is FinishReason.STOP
    assert re.fullmatch("[bd]{12,16}", result.text)


def nothing_left(llama) -> dict[str, tuple[SamplingParams, str]]:
    """Requests, and the text after which nothing is left."""
    only = llama.tokenizer.encode
    return {
        "first": (constrained("abc", allowed_token_ids=only("xyz")), ""),
        "forced": (constrained("abcd", bad_words=["abc"]), "ab"),
        "chosen": (constrained("[ab]{3}", allowed_token_ids=only("b"), bad_words=["bb"]), "b"),
        "end": (constrained("ab", allowed_token_ids=only("ab")), "ab"),
    }


@in_each_mode
def test_where_both_leave_nothing_the_request_ends_alone(llama, options):
    """The code is no_allowed_token: the grammar itself goes on."""
    free = run_one(make_engine(llama), PROMPT, FREE).token_ids
    driver = Driver(make_engine(llama, max_num_seqs=8, **options))
    requests = nothing_left(llama)
    for name, (params, _) in requests.items():
        driver.engine.add(EngineRequest(name, PROMPT, params))
    driver.engine.add(EngineRequest("free", PROMPT, FREE))
    assert finish(driver) == dict.fromkeys(requests, ErrorCode.NO_ALLOWED_TOKEN) | {"free": None}
    for name, (_, text) in requests.items():
        assert driver.results[name].text == text, name
        assert driver.results[name].stop_reason.startswith("structured_outputs, bad_words"), name
    assert driver.results["free"].token_ids == free


@in_each_mode
def test_a_grammar_that_is_empty_by_itself_is_to_blame(llama, options):
    """Its code is grammar_failed, whatever the other parameters forbid."""
    token_b = llama.tokenizer.encode("b")
    params = constrained("ab", stop_token_ids=token_b, bad_words=["ab"], temperature=0)
    driver = Driver(make_engine(llama, **options))
    driver.engine.add(EngineRequest("bad", PROMPT, params))
    assert finish(driver) == {"bad": ErrorCode.GRAMMAR_FAILED}
    assert driver.results["bad"].text == "a"


@in_each_mode
def test_each_choice_obeys_both(llama, options):
    params = constrained(LETTERS, bad_words=WORDS, n=3)
    driver = Driver(make_engine(llama, **options))
    driver.engine.add(EngineRequest("a", PROMPT, params))
    results = driver.finish()
    for index, name in enumerate(("a", "a/1", "a/2")):
        lone = params.model_copy(update={"n": 1, "seed": params.seed + index})
        assert results[name].token_ids == run_one(make_engine(llama), PROMPT, lone).token_ids
        assert not [word for word in WORDS if word in results[name].text]
