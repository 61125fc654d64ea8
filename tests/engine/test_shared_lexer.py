"""The lexer that the sequences of a grammar share: the error of one is not another's, nor holds up a step."""

import threading

import pytest

from ingine.engine.engine import Engine
from ingine.engine.grammar import compiler as compiler_module
from ingine.engine.grammar.compiler import CompiledGrammar
from ingine.engine.outputs import FinishReason
from ingine.engine.request import EngineRequest
from ingine.errors import ErrorCode
from ingine.sampling_params import SamplingParams
from tests.engine.driving import Driver, Result, make_engine, run_one
from tests.waiting import HANGS_S

PROMPT = list(range(60, 90))
CHEAP_OR_COSTLY = {"regex": r"y[a-z]{30,60}|x(.*a.{30}){20}"}
"""After an `x`, masks explore many states of the lexer."""
CHEAP = SamplingParams(temperature=1.0, seed=3, max_tokens=40, structured_outputs=CHEAP_OR_COSTLY)
COSTLY = CHEAP.model_copy(update={"temperature": 0.0})
FREE = SamplingParams(temperature=1.0, seed=7, max_tokens=40, ignore_eos=True)
MODES = {
    "a step at a time": {},
    "a step ahead": {"async_scheduling": True},
    "drafts": {"speculation": "ngram"},
}


@pytest.fixture
def fuel(monkeypatch) -> None:
    """As much as the cheap output takes, and less than the costly one."""
    monkeypatch.setitem(compiler_module.LIMITS, "step_lexer_fuel", 500)


@pytest.fixture
def compiled_in(monkeypatch) -> list[str]:
    """The names of the threads in which matchers of their own were compiled."""
    names: list[str] = []
    compile_alone = CompiledGrammar.matcher_of_its_own

    def recorded(self):
        names.append(threading.current_thread().name)
        return compile_alone(self)

    monkeypatch.setattr(CompiledGrammar, "matcher_of_its_own", recorded)
    return names


def begun(engine: Engine, text: str) -> list[int]:
    return engine.tokenizer.encode(text)


def add_cheap(engine: Engine, name: str) -> None:
    engine.add(EngineRequest(name, PROMPT, CHEAP, output_token_ids=begun(engine, "y")))


def add_costly(engine: Engine, name: str) -> None:
    engine.add(EngineRequest(name, PROMPT, COSTLY, output_token_ids=begun(engine, "x")))


def finish(engine: Engine) -> tuple[dict[str, Result], dict[str, ErrorCode | None]]:
    driver, codes = Driver(engine), {}
    while engine.has_unfinished:
        codes |= {output.seq_id: output.error_code for output in driver.step() if output.finish_reason}
    return driver.results, codes


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_an_error_of_one_is_no_other_ones_and_nothing_compiles_in_a_step(llama, fuel, compiled_in, options):
    alone = run_one(make_engine(llama), PROMPT, CHEAP, output_token_ids=llama.tokenizer.encode("y"))
    free = run_one(make_engine(llama), PROMPT, FREE)
    assert alone.finish_reason is FinishReason.LENGTH and not compiled_in
    engine = make_engine(llama, max_num_seqs=8, max_num_batched_tokens=64, **options)
    for index in range(2):
        add_cheap(engine, f"cheap {index}")
        add_costly(engine, f"costly {index}")
    engine.add(EngineRequest("free", PROMPT, FREE))
    results, codes = finish(engine)
    failed = {name for name, code in codes.items() if code is not None}
    assert failed == {"costly 0", "costly 1"} and codes["costly 0"] is ErrorCode.GRAMMAR_FAILED
    assert "too many expressions" in results["costly 0"].stop_reason
    for name in ("cheap 0", "cheap 1"):
        assert results[name].token_ids == alone.token_ids, name
    assert results["free"].token_ids == free.token_ids
    assert compiled_in and all(name.startswith("grammar") for name in compiled_in)


@pytest.mark.parametrize("options", MODES.values(), ids=MODES)
def test_others_go_on_while_a_grammar_is_compiled_again(llama, fuel, monkeypatch, options):
    entered, release, compile_alone = [], threading.Event(), CompiledGrammar.matcher_of_its_own

    def compile_late(self):
        entered.append(self)
        assert release.wait(HANGS_S)
        return compile_alone(self)

    monkeypatch.setattr(CompiledGrammar, "matcher_of_its_own", compile_late)
    engine = make_engine(llama, **options)
    driver = Driver(engine)
    for name in ("costly", "aborted"):
        add_costly(engine, name)
    while len(entered) < 2:
        driver.step()
    engine.add(EngineRequest("free", PROMPT, FREE))
    while "free" not in driver.results or driver.results["free"].finish_reason is None:
        driver.step()
    assert driver.results.keys() == {"free"}
    assert [output.finish_reason for output in engine.abort("aborted")] == [FinishReason.ABORT]
    release.set()
    assert driver.finish()["costly"].finish_reason is FinishReason.ERROR
    assert len(entered) == 2  # once for each, though with a step ahead two steps had no token for it


def test_a_new_sequence_shares_a_lexer_without_errors(llama, fuel, compiled_in):
    engine = make_engine(llama)
    add_costly(engine, "costly")
    assert finish(engine)[1] == {"costly": ErrorCode.GRAMMAR_FAILED}
    num_compiled = len(compiled_in)
    add_cheap(engine, "cheap")
    assert finish(engine)[1] == {"cheap": None}
    assert len(compiled_in) == num_compiled == 1


def test_a_closed_engine_leaves_no_thread_behind(llama):
    before = {*threading.enumerate()}
    engine = make_engine(llama)
    run_one(engine, PROMPT, SamplingParams(max_tokens=4, structured_outputs={"regex": "[a-z]{30}"}))
    started = {*threading.enumerate()} - before
    assert {thread.name.partition("_")[0] for thread in started} == {"grammar", "masks"}
    engine.close()
    for thread in started:
        thread.join(HANGS_S)
    assert not [thread.name for thread in started if thread.is_alive()]
