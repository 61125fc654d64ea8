"""A sequence that goes on elsewhere, from its committed tokens, is as if it had never been interrupted."""

import pytest

from ingine.engine.request import EngineRequest
from ingine.sampling_params import SamplingParams
from tests.engine.driving import Driver, Result, make_engine, run_one

PROMPT = list(range(60, 90))
N = 24

# Random bytes are the output of these models: text is full of half characters, which is what is to be tested.
PARAMS = {
    "greedy": SamplingParams(temperature=0, max_tokens=N),
    "random": SamplingParams(temperature=1.5, seed=1, max_tokens=N),
    "truncated": SamplingParams(temperature=1.5, seed=2, top_k=50, top_p=0.9, min_p=0.01, max_tokens=N),
    "penalties": SamplingParams(
        temperature=1.5,
        seed=3,
        repetition_penalty=1.3,
        presence_penalty=1.0,
        frequency_penalty=1.0,
        max_tokens=N,
    ),
    "min_tokens": SamplingParams(
        temperature=1.5, seed=4, min_tokens=18, stop_token_ids=tuple(range(128)), max_tokens=N
    ),
    "restricted": SamplingParams(
        temperature=1.5,
        seed=6,
        allowed_token_ids=tuple(range(64, 69)),  # a to e
        bad_words=("ab", "abc", "bcd", "ca", "e", "ded"),
        max_tokens=N,
    ),
    "bias and logprobs": SamplingParams(
        temperature=1, seed=5, logit_bias={66: 8.0, 67: 8.0, 68: 8.0}, logprobs=3, max_tokens=N
    ),
}


def text_at(result: Result, position: int) -> str:
    """The text that had been emitted after `position` output tokens."""
    return "".join(text for text, at in zip(result.texts, result.positions, strict=True) if at <= position)


def assert_resumes_at_every_position(engine_of, params: SamplingParams) -> None:
    whole = run_one(engine_of(), PROMPT, params)
    engine = engine_of()
    for position in range(len(whole.token_ids) + 1):
        rest = run_one(engine, PROMPT, params, output_token_ids=whole.token_ids[:position])
        assert whole.token_ids[:position] + rest.token_ids == whole.token_ids
        assert text_at(whole, position) + "".join(rest.texts) == "".join(whole.texts)
        assert rest.final_text == whole.final_text
        assert (rest.finish_reason, rest.stop_reason) == (whole.finish_reason, whole.stop_reason)
        assert rest.positions[-1] == len(whole.token_ids)
        for ours, expected in zip(rest.logprobs, whole.logprobs[position:], strict=True):
            assert ours["token_id"] == expected["token_id"]
            assert ours["logprob"] == pytest.approx(expected["logprob"], abs=1e-4)
            assert [token_id for token_id, _ in ours["top"]] == [token_id for token_id, _ in expected["top"]]


@pytest.mark.parametrize("is_async", [False, True], ids=["a step at a time", "a step ahead"])
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS.keys())
def test_at_every_position(llama, params, is_async):
    assert_resumes_at_every_position(lambda: make_engine(llama, async_scheduling=is_async), params)


def test_at_every_position_of_a_stop_string(llama):
    """Taken from the middle of the output, and with two more that begin like it and do not come."""
    text = run_one(make_engine(llama), PROMPT, PARAMS["random"]).text
    stop = text[len(text) // 2 :][:4]
    stops = (stop, stop[:3] + "never", text[2:4] + "never")
    params = PARAMS["random"].model_copy(update={"stop": stops})
    result = run_one(make_engine(llama), PROMPT, params)
    assert result.finish_reason == "stop" and result.stop_reason == stop
    assert result.text == text[: text.index(stop)] and result.final_text == ""
    assert_resumes_at_every_position(lambda: make_engine(llama), params)


@pytest.mark.parametrize("is_async", [False, True], ids=["a step at a time", "a step ahead"])
def test_rebatched_and_preempted_sequences_draw_the_same_tokens(llama, is_async):
    """All kinds of sampling in one batch, short of memory, against each alone."""
    alone = {name: run_one(make_engine(llama), PROMPT, params) for name, params in PARAMS.items()}
    options = {"max_num_seqs": 6, "max_num_batched_tokens": 11, "num_blocks": 30}
    driver = Driver(make_engine(llama, async_scheduling=is_async, **options))
    for name, params in PARAMS.items():
        driver.engine.add(EngineRequest(name, PROMPT, params))
        driver.step()
    together = driver.finish()
    assert driver.engine.stats().num_preemptions > 0
    for name, result in alone.items():
        assert together[name].token_ids == result.token_ids
        assert together[name].texts == result.texts


@pytest.mark.parametrize(
    ("params", "output", "expected"),
    [
        ({"max_tokens": 2}, "ab", "length"),
        ({}, ["<|im_end|>"], "stop"),
        ({"stop": ("bc",)}, "abc", "stop"),
        ({"stop_token_ids": (65,)}, [65], "stop"),
        ({}, "x" * 130, "length"),  # with the prompt, all that the model takes
    ],
    ids=["max_tokens", "end of sequence", "stop string", "stop token", "model length"],
)
def test_committed_tokens_may_be_the_end_already(llama, params, output, expected):
    token_ids = [
        token_id
        for piece in output
        for token_id in ([piece] if isinstance(piece, int) else llama.tokenizer.encode(piece))
    ]
    engine = make_engine(llama)
    engine.add(
        EngineRequest(
            "one", PROMPT, SamplingParams(**{"max_tokens": 200, **params}), output_token_ids=token_ids
        )
    )
    [output] = engine.step()
    assert (output.token_ids, output.text, output.finish_reason) == ([], "", expected)
    assert output.position == len(token_ids)
    assert not engine.has_unfinished
    engine.check_integrity()


def test_a_smaller_engine_ends_what_a_larger_one_began_at_its_own_limit(llama):
    """It could not have made that many itself; their number stays what the log says."""
    engine = make_engine(llama, max_model_len=40)
    engine.add(EngineRequest("one", PROMPT, SamplingParams(max_tokens=200), output_token_ids=[65] * 20))
    [output] = engine.step()
    assert (output.finish_reason, output.position) == ("length", 20)
