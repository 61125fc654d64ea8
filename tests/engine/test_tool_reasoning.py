"""Tool calls that are enforced behind reasoning: what is enforced begins where the reasoning ends."""

import json

import pytest

from ingine.engine.engine import Engine
from ingine.engine.grammar.tools import tool_constraint
from ingine.engine.message_format import MessageFormat, NamedFunction
from ingine.engine.outputs import FinishReason
from ingine.engine.parsers.message_parser import functions_of, parser_of
from ingine.engine.parsers.reasoning import REASONING_TAGS
from ingine.engine.request import EngineRequest
from ingine.sampling_params import SamplingParams
from tests.engine.conftest import LoadedModel, load
from tests.engine.driving import Driver, Result, make_engine, run_one
from tests.tiny_models import EOS_TOKEN_ID, VOCAB_SIZE, add_tokens, make_tiny_model

PROMPT = list(range(60, 70))
MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
OPEN, CLOSE, CALL, _ = range(VOCAB_SIZE, VOCAB_SIZE + len(MARKERS))
PARAMETERS = {
    "type": "object",
    "properties": {"unit": {"enum": ["C", "F"]}, "days": {"enum": [1, 2]}},
    "required": ["unit"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": PARAMETERS, "strict": True}}
    for name in ("f", "g")
]
CHOICES = {"required": "required", "named": NamedFunction("g"), "auto": "auto"}
MODES = {
    "a step at a time": {},
    "a step ahead": {"async_scheduling": True},
    "drafts": {"speculation": "ngram"},
}
CASES = [(name, starts) for name in CHOICES for starts in (True, False)]
SEEDS = {True: 34, False: 9}
"""By whether the prompt begins the reasoning: with these all outputs reason, call and end."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> LoadedModel:
    path = tmp_path_factory.mktemp("with markers")
    make_tiny_model(path, vocab_size=VOCAB_SIZE + len(MARKERS))
    add_tokens(path, MARKERS)
    return load(path)


def engine_of(model: LoadedModel, **options) -> Engine:
    return make_engine(model, **{"max_num_seqs": 100, "max_num_batched_tokens": 400} | options)


def request_of(model: LoadedModel, name: str, *, starts: bool) -> dict:
    """The parameters and the message format of a request that a random model is likely to end."""
    [a, bracket, *spaces] = (model.tokenizer.encode(char)[0] for char in "a] \n\t\r")
    bias = dict.fromkeys((a, CLOSE, CALL, bracket), 14.0) | dict.fromkeys(spaces, -100.0)
    bias |= {OPEN: -100.0 if starts else 16.0, EOS_TOKEN_ID: 16.0}
    constraint = tool_constraint(
        TOOLS,
        CHOICES[name],
        parallel_tool_calls=True,
        tool_format="hermes",
        token_id=model.tokenizer.control_token_id,
    )
    params = SamplingParams(temperature=1.0, seed=SEEDS[starts], max_tokens=150, logit_bias=bias)
    message = MessageFormat(
        "hermes",
        functions_of(TOOLS),
        tool_choice=CHOICES[name],
        reasoning=REASONING_TAGS["think"],
        starts_in_reasoning=starts,
        key="job",
    )
    return {"params": constraint.added_to(params), "message": message}


@pytest.fixture(scope="module")
def alone(model) -> dict[tuple[str, bool], Result]:
    """The output of each of CASES by itself, without drafts: a delta has one token."""
    results = {}
    for name, starts in CASES:
        engine = engine_of(model)
        engine._scheduler.max_forced_draft = 0
        results[name, starts] = run_one(engine, PROMPT, **request_of(model, name, starts=starts))
    return results


@pytest.mark.parametrize(("name", "starts"), CASES)
def test_a_model_reasons_and_then_calls_as_it_has_to(model, alone, name, starts):
    result, request = alone[name, starts], request_of(model, name, starts=starts)
    assert result.finish_reason is (FinishReason.STOP if name == "named" else FinishReason.TOOL_CALLS)
    message = result.message
    assert message.reasoning and message.tool_calls
    assert name == "auto" or not message.content
    for call in message.tool_calls:
        assert call.name == "g" or name != "named"
        arguments = json.loads(call.arguments)
        assert arguments.pop("unit") in ("C", "F") and arguments.get("days", 1) in (1, 2)
    parser = parser_of(request["message"])
    parser.feed(result.text)
    parser.flush()
    assert parser.message() == message == result.assembled()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("name", "starts"), CASES)
def test_resumed_at_every_token(model, alone, name, starts, mode):
    whole, request = alone[name, starts], request_of(model, name, starts=starts)
    engine = engine_of(model, **MODES[mode])
    for position in range(len(whole.token_ids) + 1):
        earlier = whole.token_ids[:position]
        engine.add(EngineRequest(str(position), PROMPT, output_token_ids=earlier, **request))
    results = Driver(engine).finish()
    for position in range(len(whole.token_ids) + 1):
        rest = results[str(position)]
        assert rest.token_ids == whole.token_ids[position:], position
        assert rest.message == rest.assembled(*whole.deltas[:position]) == whole.message, position
        assert rest.finish_reason is whole.finish_reason
