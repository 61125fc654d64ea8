"""Constrained sequences give the same tokens alone, in any mix, resumed, preempted, and with drafts."""

import json
import time
from concurrent.futures import Future
from threading import Event

import jsonschema
import pytest
import torch

from ingine import LLM
from ingine.engine.engine import Engine
from ingine.engine.grammar.masks import MaskFiller
from ingine.engine.outputs import FinishReason
from ingine.engine.request import EngineRequest
from ingine.errors import ErrorCode, InvalidRequest
from ingine.sampling_params import SamplingParams
from tests.engine.driving import Driver, Result, make_engine, run_one
from tests.waiting import HANGS_S

PROMPT = list(range(60, 90))
SCHEMA = {
    "type": "object",
    "properties": {
        "identifier": {"type": "integer", "minimum": 0, "maximum": 99},
        "colour": {"enum": ["red", "green"]},
        "notes": {"type": "array", "items": {"type": "string", "maxLength": 3}, "maxItems": 2},
    },
    "required": ["identifier", "colour", "notes"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
ASKED = {
    "json": {"json": SCHEMA},
    "regex": {"regex": "[a-f]{3,9}-(foo|bar)+[0-9]{2}"},
    "choice": {"choice": ["yes", "no", "a long answer that nobody expects"]},
    "special": {"grammar": 'start: <|im_start|> /[a-z]{1,5}/ <|im_start|> "end of it"'},
}
PARAMS = {
    f"{name} {kind}": SamplingParams(max_tokens=90, structured_outputs=asked, **sampling)
    for name, asked in ASKED.items()
    for kind, sampling in {
        "greedy": {"temperature": 0},
        "random": {"temperature": 1.0, "seed": 1, "top_p": 0.9},
    }.items()
} | {
    "penalties": SamplingParams(
        temperature=1.2,
        seed=3,
        max_tokens=90,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        logit_bias={ord("!") - 33: 100.0},
        logprobs=2,
        structured_outputs=ASKED["regex"],
    ),
    "ends": SamplingParams(
        temperature=1.0,
        seed=4,
        max_tokens=90,
        min_tokens=8,
        ignore_eos=True,
        stop_token_ids=[256],
        structured_outputs={"regex": "[a-z]{2,12}"},
    ),
}
FREE = SamplingParams(temperature=1.0, seed=7, max_tokens=40, ignore_eos=True)
MODES = {
    "a step at a time": {},
    "a step ahead": {"async_scheduling": True},
    "drafts": {"speculation": "ngram"},
}


def without_forced_drafts(engine: Engine) -> Engine:
    engine._scheduler.max_forced_draft = 0
    return engine


@pytest.fixture(scope="module")
def alone(llama) -> dict[str, Result]:
    """What each of PARAMS gives by itself, without drafts of any kind."""
    return {
        name: run_one(without_forced_drafts(make_engine(llama)), PROMPT, params)
        for name, params in PARAMS.items()
    }


def same(ours: Result, expected: Result, start: int = 0) -> bool:
    return (
        ours.token_ids == expected.token_ids[start:]
        and ours.finish_reason == expected.finish_reason
        and ours.stop_reason == expected.stop_reason
        and (start > 0 or ours.text == expected.text)
    )


def test_each_output_is_of_its_grammar(alone):
    for name, result in alone.items():
        assert result.finish_reason is FinishReason.STOP, name
    jsonschema.validate(json.loads(alone["json greedy"].text), SCHEMA)
    jsonschema.validate(json.loads(alone["json random"].text), SCHEMA)
    assert alone["choice random"].text in ASKED["choice"]["choice"]
    assert alone["special greedy"].text.endswith("end of it")
    assert len(alone["ends"].token_ids) >= 8


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_in_a_batch_with_free_sequences_each_is_as_alone(llama, alone, options):
    engine = make_engine(llama, max_num_seqs=32, max_num_batched_tokens=64, **options)
    free_alone = run_one(make_engine(llama), PROMPT[:7], FREE)
    for index, (name, params) in enumerate(PARAMS.items()):
        engine.add(EngineRequest(name, PROMPT, params))
        engine.add(EngineRequest(f"free {index}", PROMPT[:7], FREE))
    results = Driver(engine).finish()
    for name in PARAMS:
        assert same(results[name], alone[name]), name
    assert all(results[f"free {index}"].token_ids == free_alone.token_ids for index in range(len(PARAMS)))


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
@pytest.mark.parametrize("name", ["json random", "special random", "penalties", "ends"])
def test_resumed_at_every_token_it_goes_on(llama, alone, name, options):
    engine, whole = make_engine(llama, max_num_seqs=100, max_num_batched_tokens=200, **options), alone[name]
    positions = range(len(whole.token_ids) + 1)
    for position in positions:
        so_far = whole.token_ids[:position]
        engine.add(EngineRequest(str(position), PROMPT, PARAMS[name], output_token_ids=so_far))
    results = Driver(engine).finish()
    for position in positions:
        assert same(results[str(position)], whole, position), position


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_preempted_it_goes_on(llama, alone, options):
    engine = make_engine(llama, num_blocks=44, **options)
    for name, params in PARAMS.items():
        engine.add(EngineRequest(name, PROMPT, params))
    while engine.stats().num_compiling:  # else the first sequences may end before the last ones begin
        engine._requests.compiling.wait()
        engine._requests.take_compiled()
    results = Driver(engine).finish()
    assert engine.stats().num_preemptions
    for name in PARAMS:
        assert same(results[name], alone[name]), name


@pytest.mark.parametrize("options", [{}, {"speculation": "ngram"}], ids=["no speculator", "ngram"])
def test_forced_tokens_take_fewer_steps_and_change_nothing(llama, alone, options):
    def steps(engine: Engine) -> tuple[int, Result]:
        driver, num_steps = Driver(engine), 0
        engine.add(EngineRequest("one", PROMPT, PARAMS["json random"]))
        while engine.has_unfinished:
            num_steps += bool(driver.step())
        return num_steps, driver.results["one"]

    num_steps, result = steps(make_engine(llama, **options))
    num_without, without = steps(without_forced_drafts(make_engine(llama, **options)))
    assert same(result, alone["json random"]) and same(without, alone["json random"])
    assert num_steps < num_without - 20


def test_forced_tokens_are_no_guesses(llama):
    """Else the acceptance rate of speculation would be that of grammars."""
    engine = make_engine(llama)
    run_one(engine, PROMPT, PARAMS["json random"])
    assert (engine.stats().num_draft_tokens, engine.stats().num_accepted_tokens) == (0, 0)
    engine, num_guessed = make_engine(llama, speculation="ngram"), 0

    def guess(seqs, max_num_tokens):
        nonlocal num_guessed
        drafts = [[1] * (seq.grammar is None and max_num_tokens > 0) for seq in seqs]
        num_guessed += sum(map(len, drafts))
        return drafts

    engine._speculator.draft = guess
    for name, params in {"json": PARAMS["json random"], "free": FREE}.items():
        engine.add(EngineRequest(name, PROMPT, params))
    Driver(engine).finish()
    assert engine.stats().num_draft_tokens == num_guessed > engine.stats().num_accepted_tokens


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_an_empty_mask_ends_that_sequence_alone_with_a_code(llama, alone, options):
    stopped = SamplingParams(
        temperature=0, structured_outputs={"regex": "ab"}, stop_token_ids=[llama.tokenizer.encode("b")[0]]
    )
    engine = make_engine(llama, max_num_seqs=8, **options)
    for name, params in {"bad": stopped, "json": PARAMS["json random"], "free": FREE}.items():
        engine.add(EngineRequest(name, PROMPT, params))
    driver, codes = Driver(engine), {}
    while engine.has_unfinished:
        codes |= {output.seq_id: output.error_code for output in driver.step() if output.finish_reason}
    assert codes == {"bad": ErrorCode.GRAMMAR_FAILED, "json": None, "free": None}
    assert driver.results["bad"].text == "a"
    assert driver.results["bad"].finish_reason is FinishReason.ERROR
    assert "stop token" in driver.results["bad"].stop_reason
    assert same(driver.results["json"], alone["json random"])


def finish_with_codes(engine: Engine) -> dict:
    driver, codes = Driver(engine), {}
    while engine.has_unfinished:
        codes |= {output.seq_id: output.error_code for output in driver.step() if output.finish_reason}
    return codes


def test_a_grammar_that_does_not_compile_here_ends_its_sequence(llama):
    engine = make_engine(llama)
    engine.add(EngineRequest("bad", PROMPT, SamplingParams(structured_outputs={"regex": "(a"})))
    engine.add(EngineRequest("free", PROMPT, FREE))
    assert finish_with_codes(engine) == {"bad": ErrorCode.INVALID_GRAMMAR, "free": None}


def test_output_that_is_not_of_the_grammar_ends_its_sequence(llama):
    engine = make_engine(llama)
    forged = llama.tokenizer.encode("zzz")
    engine.add(EngineRequest("forged", PROMPT, PARAMS["json greedy"], output_token_ids=forged))
    assert finish_with_codes(engine) == {"forged": ErrorCode.GRAMMAR_FAILED}


def test_what_compiles_holds_nobody_up_and_can_be_aborted(llama):
    engine = make_engine(llama)
    release, compile_now = Event(), engine.grammars.compile
    engine.grammars.compile = lambda params: release.wait(HANGS_S) and compile_now(params)
    engine.add(EngineRequest("constrained", PROMPT, PARAMS["json greedy"]))
    engine.add(EngineRequest("aborted", PROMPT, PARAMS["json greedy"]))
    engine.add(EngineRequest("free", PROMPT, FREE))
    driver = Driver(engine)
    while "free" not in driver.results or driver.results["free"].finish_reason is None:
        driver.step()
    assert driver.results.keys() == {"free"} and engine.stats().num_waiting == 2
    assert [output.finish_reason for output in engine.abort("aborted")] == [FinishReason.ABORT]
    release.set()
    deadline = time.monotonic() + HANGS_S
    while engine.has_unfinished and time.monotonic() < deadline:
        driver.step()
    assert driver.results["constrained"].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("is_transient", [False, True])
def test_logits_of_nan_never_let_a_token_of_another_place_through(
    llama, alone, monkeypatch, is_async, is_transient
):
    """With a step ahead, the next step has computed on from a token that could not be chosen."""
    engine = make_engine(llama, async_scheduling=is_async)
    driver, compute_logits, num_calls = Driver(engine), llama.decoder.compute_logits, 0

    def poisoned(hidden):
        nonlocal num_calls
        logits, before = compute_logits(hidden), num_calls
        num_calls += 1
        return logits.fill_(torch.nan) if before == 3 or (before > 3 and not is_transient) else logits

    monkeypatch.setattr(llama.decoder, "compute_logits", poisoned)
    engine.add(EngineRequest("one", PROMPT, PARAMS["regex random"]))
    result = driver.finish()["one"]
    expected = alone["regex random"].token_ids
    assert result.token_ids == expected[: len(result.token_ids)]
    if is_transient and not is_async:
        assert same(result, alone["regex random"])
    else:
        assert (result.finish_reason, result.stop_reason) == ("error", "the model's logits are not finite")


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_each_of_several_choices_has_a_state_of_its_own(llama, options):
    params = SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=90, structured_outputs=ASKED["json"])

    def choices(engine: Engine, **more) -> list[list[int]]:
        engine.add(EngineRequest("one", PROMPT, params, **more))
        engine.add(EngineRequest("free", PROMPT, FREE))
        found: list[list[int]] = [[], [], []]
        while engine.has_unfinished:
            for output in engine.step():
                if output.seq_id == "one":
                    found[output.index] += output.token_ids
        return found

    expected = choices(without_forced_drafts(make_engine(llama)))
    for token_ids in expected:
        jsonschema.validate(json.loads(llama.tokenizer.decode(token_ids)), SCHEMA)
    assert choices(make_engine(llama, **options)) == expected
    so_far = [token_ids[:7] for token_ids in expected]
    rest = choices(
        make_engine(llama, **options), output_token_ids=so_far[0], other_output_token_ids=so_far[1:]
    )
    assert [[*first, *more] for first, more in zip(so_far, rest, strict=True)] == expected


def test_a_panic_in_a_compiler_thread_ends_its_sequence_alone(llama, monkeypatch):
    class Panic(BaseException):
        """As pyo3 raises it."""

    def panic(*_, **__):
        raise Panic("assertion failed")

    monkeypatch.setattr("ingine.engine.grammar.pool.GrammarState", panic)
    engine = make_engine(llama)
    engine.add(EngineRequest("bad", PROMPT, PARAMS["json greedy"]))
    engine.add(EngineRequest("free", PROMPT, FREE))
    assert finish_with_codes(engine) == {"bad": ErrorCode.GRAMMAR_FAILED, "free": None}


def test_a_step_whose_sampling_fails_waits_for_its_masks(llama, alone, monkeypatch):
    engine, raised, has_returned, overtaken = make_engine(llama), Event(), Event(), []
    fill, compute_logits = MaskFiller.fill, llama.decoder.compute_logits

    def fill_late(self, constrained):
        if not raised.is_set():
            assert raised.wait(HANGS_S)
            overtaken.append(has_returned.wait(0.1))  # its states may be read by nobody until it is done
        return fill(self, constrained)

    def fail_once(hidden):
        if not raised.is_set():
            raised.set()
            raise RuntimeError("no logits")
        return compute_logits(hidden)

    monkeypatch.setattr(MaskFiller, "fill", fill_late)
    monkeypatch.setattr(llama.decoder, "compute_logits", fail_once)
    engine.add(EngineRequest("one", PROMPT, PARAMS["regex random"]))
    driver = Driver(engine)
    with pytest.raises(RuntimeError, match="no logits"):
        while True:
            driver.step()
    has_returned.set()
    assert same(driver.finish()["one"], alone["regex random"])
    assert overtaken == [False]


@pytest.mark.parametrize("is_async", [False, True])
def test_a_choice_whose_grammar_fails_late_ends_the_request_after_all_tokens(llama, is_async):
    engine = make_engine(llama, async_scheduling=is_async)
    begin, late = engine.grammars.begin, Future()
    engine.grammars.begin = lambda request, index, eos: late if index == 1 else begin(request, index, eos)
    params = SamplingParams(temperature=1.0, seed=5, n=2, max_tokens=90, structured_outputs=ASKED["json"])
    engine.add(EngineRequest("one", PROMPT, params))
    driver, outputs = Driver(engine), []
    while len(driver.results["one"].token_ids if driver.results else ()) < 3:
        driver.step()
    late.set_exception(InvalidRequest(ErrorCode.GRAMMAR_FAILED, "not of its grammar"))
    while engine.has_unfinished:
        outputs += driver.step()
    assert [output.ends_request for output in outputs] == [False] * (len(outputs) - 1) + [True]
    assert (outputs[-1].index, outputs[-1].error_code) == (1, ErrorCode.GRAMMAR_FAILED)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("smollm2", max_model_len=512, kv_cache_bytes="64MiB")


def test_generate_gives_valid_json_of_the_real_model(llm):
    schema = SCHEMA | {"x-guidance": {}}
    params = [
        SamplingParams(
            temperature=temperature, seed=seed, max_tokens=120, structured_outputs={"json": schema}
        )
        for seed, temperature in enumerate((0.0, 0.7, 1.0))
    ]
    outputs = llm.generate(["Describe a thing as JSON: "] * 3, params)
    ended = [output.outputs[0] for output in outputs if output.outputs[0].finish_reason == "stop"]
    assert ended
    for completion in ended:
        jsonschema.validate(json.loads(completion.text), schema)


def test_generate_refuses_what_cannot_be_enforced_before_it_runs(llm):
    with pytest.raises(InvalidRequest, match="not") as refused:
        llm.generate("x", SamplingParams(structured_outputs={"json": {"not": {"type": "string"}}}))
    assert refused.value.code == ErrorCode.UNSUPPORTED_GRAMMAR
    assert llm.generate("x", SamplingParams(max_tokens=1))[0].finished
