"""Messages through the whole engine: in every mode, in any batch, preempted and resumed."""

import json
import re

import pytest

from ingine.engine.engine import Engine
from ingine.engine.outputs import FinishReason
from ingine.engine.parsers.message_parser import parser_of
from ingine.engine.request import EngineRequest
from ingine.message import Message
from ingine.sampling_params import SamplingParams
from tests.engine.conftest import LoadedModel, load
from tests.engine.driving import Driver, Result, make_engine, run_one
from tests.engine.model_outputs import OUTPUTS, Output
from tests.engine.test_sequence_messages import format_of
from tests.tiny_models import VOCAB_SIZE, make_tiny_model, make_tokenizer

PROMPT = list(range(60, 70))
MARKERS = ["[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "<|python_tag|>"]
"""Special tokens: they are in no text. Tags of reasoning are none, so that a grammar holds within it too."""
MODES = {
    "a step at a time": {},
    "a step ahead": {"async_scheduling": True},
    "drafts": {"speculation": "ngram"},
    "preempted": {"num_blocks": 40},
}
SAID = [
    name
    for name, output in OUTPUTS.items()
    if 0 < len(output.text) <= 50 and not output.starts_in_reasoning  # no grammar can force the latter
]
SHORT = ["mistral, reasoning", "no tools"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LoadedModel:
    path = tmp_path_factory.mktemp("with markers")
    make_tiny_model(path, vocab_size=VOCAB_SIZE + len(MARKERS))
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    tokenizer.save_pretrained(path)
    return load(path)


def engine_of(model: LoadedModel, **options) -> Engine:
    return make_engine(
        model, **{"max_num_seqs": 100, "max_num_batched_tokens": 400, "max_model_len": 500} | options
    )


def saying(text: str, **options) -> SamplingParams:
    """Parameters with which a model says `text`, with its special tokens where their names are."""
    pieces = re.split("({})".format("|".join(map(re.escape, MARKERS))), text)
    rule = " ".join(
        f"<[{VOCAB_SIZE + MARKERS.index(piece)}]>"
        if piece in MARKERS
        else json.dumps(piece, ensure_ascii=False)
        for piece in pieces
        if piece
    )
    grammar = {"grammar": f"start: {rule}"}
    return SamplingParams(**{"temperature": 0, "structured_outputs": grammar, "max_tokens": 480} | options)


def read_at_once(output: Output, text: str | None = None, index: int = 0) -> Message:
    parser = parser_of(format_of(output), index)
    parser.feed(output.text if text is None else text)
    parser.flush()
    return parser.message()


def says(model: LoadedModel, output: Output, *, engine: Engine | None = None, **options) -> Result:
    request = {name: options.pop(name) for name in ("output_token_ids", "ended_choices") if name in options}
    params = saying(output.text, **options)
    return run_one(engine or engine_of(model), PROMPT, params, message=format_of(output), **request)


@pytest.mark.parametrize("mode", MODES)
def test_a_batch_of_messages(model, mode):
    driver = Driver(engine_of(model, **MODES[mode]))
    for name in SAID:
        output = OUTPUTS[name]
        driver.engine.add(EngineRequest(name, PROMPT, saying(output.text), message=format_of(output)))
    results = driver.finish()
    assert (driver.engine.stats().num_preemptions > 0) == (mode == "preempted")
    for name in SAID:
        output, result = OUTPUTS[name], results[name]
        assert result.message == result.assembled() == read_at_once(output), name
        calls = tuple((call.name, call.arguments) for call in result.message.tool_calls)
        assert (result.message.content, result.message.reasoning) == (output.content, output.reasoning)
        assert calls == output.calls
        free = output.calls and isinstance(output.choice, str)
        assert result.finish_reason is (FinishReason.TOOL_CALLS if free else FinishReason.STOP), name


@pytest.mark.parametrize("mode", ["a step at a time", "a step ahead"])
@pytest.mark.parametrize("name", SHORT)
def test_resumed_at_every_token(model, name, mode):
    output = OUTPUTS[name]
    whole = says(model, output, engine=without_forced_drafts(engine_of(model)))
    assert len(whole.positions) == len(whole.token_ids)
    driver = Driver(engine_of(model, **MODES[mode]))
    for position in range(len(whole.token_ids) + 1):
        request = EngineRequest(
            str(position),
            PROMPT,
            saying(output.text),
            output_token_ids=whole.token_ids[:position],
            message=format_of(output),
        )
        driver.engine.add(request)
    results = driver.finish()
    for position in range(len(whole.token_ids) + 1):
        rest = results[str(position)]
        assert rest.message == rest.assembled(*whole.deltas[:position]) == read_at_once(output)
        assert rest.finish_reason is whole.finish_reason


def without_forced_drafts(engine: Engine) -> Engine:
    engine._scheduler.max_forced_draft = 0
    return engine


@pytest.mark.parametrize("mode", ["a step at a time", "a step ahead"])
def test_each_choice_has_a_message_of_its_own(model, mode):
    """An earlier attempt has ended some of them, and left others in the middle."""
    output = OUTPUTS["mistral, without [ARGS]"]
    texts = ["[TOOL_CALLS]now{}", "No. [TOOL_CALLS]now{}", "[TOOL_CALLS]now{}[TOOL_CALLS]now{}", "No [TOOL"]
    asked = {"choice": texts}
    params = SamplingParams(temperature=2.0, seed=1, n=4, max_tokens=300, structured_outputs=asked)

    def run(**committed) -> list[Result]:
        driver = Driver(engine_of(model, **MODES[mode]))
        driver.engine.add(EngineRequest("a", PROMPT, params, message=format_of(output), **committed))
        results = driver.finish()
        return [results[name] for name in ("a", "a/1", "a/2", "a/3")]

    whole = run()
    assert len({result.text for result in whole}) > 1
    for index, result in enumerate(whole):
        assert result.message == result.assembled() == read_at_once(output, result.text, index)
    ids = [call.id for result in whole for call in result.message.tool_calls]
    assert len(set(ids)) == len(ids) > 2
    first, *others = [whole[0].token_ids, whole[1].token_ids[:9], (), whole[3].token_ids[:-1]]
    resumed = run(output_token_ids=first, other_output_token_ids=others, ended_choices=(0,))
    assert [result.message for result in resumed] == [result.message for result in whole]
    assert [result.finish_reason for result in resumed] == [result.finish_reason for result in whole]
    assert resumed[0].deltas[0] is None and resumed[2].deltas != [None]


@pytest.mark.parametrize("mode", ["a step at a time", "a step ahead"])
@pytest.mark.parametrize(("stop", "finish_reason"), [("ris", "tool_calls"), ("get", "stop")])
def test_a_stop_string_within_a_call(model, mode, stop, finish_reason):
    output = OUTPUTS["one call"]
    result = says(model, output, engine=engine_of(model, **MODES[mode]), stop=(stop,))
    kept, _, _ = output.text.partition(stop)
    assert (result.text, result.stop_reason, result.finish_reason) == (kept, stop, finish_reason)
    assert result.message == result.assembled() == read_at_once(output, kept)


def test_an_aborted_request_has_deltas_and_no_message(model):
    output = OUTPUTS["mistral, unknown"]
    driver = Driver(without_forced_drafts(engine_of(model)))
    driver.engine.add(EngineRequest("a", PROMPT, saying(output.text), message=format_of(output)))
    while driver.engine.stats().num_output_tokens < 8:
        driver.step()
    result = driver.results["a"]
    [last] = driver.engine.abort("a")
    result.take(last)
    assert (last.message, last.delta, last.finish_reason) == (None, None, FinishReason.ABORT)
    assert result.assembled() == read_at_once(output, "[TOOL_CALLS]rm[ARGS]{}[TOOL_CALLS][TOOL_CALLS]")


def test_what_the_text_shows_changes_no_message(model):
    output = OUTPUTS["mistral, reasoning"]
    hidden = says(model, output)
    shown = says(model, output, skip_special_tokens=False)
    assert (hidden.text, shown.text) == ("[THINK]Hm[/THINK]now{}", output.text)
    assert hidden.message == shown.message == read_at_once(output)
    silent = says(model, output, detokenize=False)
    assert (silent.message, set(silent.deltas), silent.finish_reason) == (None, {None}, "stop")


def test_without_a_format_there_is_no_message(model):
    result = run_one(engine_of(model), PROMPT, saying(OUTPUTS["one call"].text))
    assert (result.message, set(result.deltas), result.finish_reason) == (None, {None}, "stop")
