"""Tool calls that are enforced in jobs of a model that writes each tag of reasoning and of calls as a token,
and in jobs that go on."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ingine.contract.jobs import Job
from ingine.contract.record import JobStatus
from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from tests.tiny_models import CHAT_TEMPLATE, EOS_TOKEN_ID, VOCAB_SIZE, add_tokens, make_tiny_model
from tests.worker.test_message_jobs import put_together, without_ids
from tests.worker.test_tool_jobs import POINT_CHOICE, STRICT, TOOLS, calls_of, job
from tests.worker.test_worker import leave_behind

MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
OPEN, CLOSE, CALL, _ = range(VOCAB_SIZE, VOCAB_SIZE + len(MARKERS))
SHOWS_FORMATS = "{# " + " ".join(MARKERS) + " #}"
CASES = {
    "required": {"tools": TOOLS, "tool_choice": "required"},
    "named": {"tools": TOOLS, "tool_choice": POINT_CHOICE},
    "strict": {"tools": STRICT},
    "one": {"tools": TOOLS, "parallel_tool_calls": False},
}
SEEDS = {"required": 11, "named": 11, "strict": 30, "one": 30}
"""With these every output reasons, calls and ends."""


@pytest.fixture(scope="module")
def make_engine(request, tmp_path_factory) -> Callable[[], Engine]:
    """Makes engines whose tags of calls are text, as Qwen's, or special tokens, as of some Hermes models."""
    path: Path = tmp_path_factory.mktemp(request.param)
    make_tiny_model(path, chat_template=CHAT_TEMPLATE + SHOWS_FORMATS, vocab_size=VOCAB_SIZE + len(MARKERS))
    are_text = 4 if request.param == "text" else 2
    add_tokens(path, MARKERS[:are_text], MARKERS[are_text:])
    options = {"dtype": "float32", "device": "cpu", "max_num_seqs": 8, "kv_cache_bytes": 8 << 20}
    return lambda: Engine(EngineConfig(str(path), **options))


def marked(job_id: str, engine: Engine, *, seed: int, **fields) -> Job:
    """A job that a random model is likely to end, with reasoning and a call."""
    [a, bracket, *spaces] = (engine.tokenizer.encode(char)[0] for char in "a] \n\t\r")
    bias = dict.fromkeys((a, CLOSE, CALL, bracket), 14.0) | dict.fromkeys(spaces, -100.0)
    bias |= {OPEN: 16.0, EOS_TOKEN_ID: 16.0}
    return job(job_id, sampling={"seed": seed, "logit_bias": bias, "max_tokens": 200}, **fields)


@pytest.mark.parametrize(
    ("make_engine", "name"),
    [*(("text", name) for name in CASES), ("special", "strict")],
    indirect=["make_engine"],
)
async def test_a_model_reasons_and_then_calls_as_it_has_to(harness, step_by_step, make_engine, name):
    engine = make_engine()
    here = await harness(engine)
    whole = marked("whole", engine, seed=SEEDS[name], **CASES[name])
    await here.push(whole)
    *tokens, end = events = await here.events("whole")
    assert end.status is JobStatus.FINISHED, end.error
    assert end.finish_reason == ("stop" if name == "named" else "tool_calls")
    calls = calls_of(end.message) if name != "one" else end.message["tool_calls"]
    assert calls and end.message["reasoning"]
    assert name != "one" or len(calls) == 1
    assert put_together(event.delta for event in events) == end.message
    await here.stop()

    token_ids = [token_id for event in tokens for token_id in event.token_ids]
    heir = await harness(make_engine())
    numbers = range(0, len(tokens) + 1, 2)
    for number in numbers:
        again = whole.model_copy(update={"id": f"at-{number}"})
        await leave_behind(heir, again, tokens[:number], number=number)
    for number in numbers:
        *rest, resumed = await heir.events(f"at-{number}")
        assert [token_id for event in rest for token_id in event.token_ids] == token_ids
        deltas = [event.delta for event in (*rest, resumed)]
        messages = [end.message, resumed.message, put_together(deltas)]
        assert without_ids(messages) == without_ids([end.message] * 3), number
        assert resumed.finish_reason == end.finish_reason
