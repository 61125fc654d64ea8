"""Jobs whose output has to have a shape: from a bare XADD to the terminal event, and after a hand-over."""

import json
from threading import Event

import jsonschema
import msgpack
import pytest

from ingine.contract.jobs import Job
from ingine.contract.record import JobStatus
from ingine.engine.request import EngineRequest
from ingine.errors import ErrorCode
from ingine.worker.grammar_version import LLGUIDANCE_VERSION
from tests.tiny_models import EOS_TOKEN_ID
from tests.waiting import HANGS_S, wait_until_async

SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Oslo", "Rome"]}, "people": {"type": "integer", "maximum": 10**6}},
    "required": ["city", "people"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


def job(name: str, asked: dict, **sampling) -> Job:
    sampling = {"temperature": 1.0, "max_tokens": 120} | sampling
    return Job(id=name, prompt="Say it: ", sampling=sampling | {"structured_outputs": asked})


async def test_each_kind_gives_what_it_asks_for(harness):
    worker = await harness()
    await worker.push(job("json", {"json": SCHEMA}))
    await worker.push(job("text", {"json": json.dumps(SCHEMA)}, seed=5))
    await worker.push(job("choice", {"choice": ["left", "right"]}))
    await worker.push(Job(id="free", prompt="Say it: ", sampling={"max_tokens": 30, "ignore_eos": True}))
    for name in ("json", "text"):
        jsonschema.validate(json.loads(await worker.text(name)), SCHEMA)
        end = await worker.end(name)
        assert (end.status, end.finish_reason) == (JobStatus.FINISHED, "stop")
    assert await worker.text("choice") in ("left", "right")
    assert (await worker.end("free")).usage["num_output_tokens"] == 30
    record = await worker.redis.hgetall(worker.keys.job("json"))
    assert record[b"llguidance"].decode() == LLGUIDANCE_VERSION
    beat = None

    async def has_beaten() -> bool:
        nonlocal beat
        beats = await worker.redis.hvals(worker.keys.workers)
        beat = msgpack.unpackb(beats[0]) if beats else None
        return beat is not None

    await wait_until_async(has_beaten, what="a heartbeat")
    assert beat["llguidance"] == LLGUIDANCE_VERSION


@pytest.mark.parametrize(
    ("asked", "code", "says"),
    [
        ({"json": {"not": {}}}, ErrorCode.UNSUPPORTED_GRAMMAR, "not"),
        ({"regex": "(a"}, ErrorCode.INVALID_GRAMMAR, "unclosed"),
        (
            {"json": json.dumps({"properties": {f"p{i}": {} for i in range(4000)}})},
            ErrorCode.GRAMMAR_TOO_COSTLY,
            "json",
        ),
        ({"json": {}, "regex": "a"}, ErrorCode.INVALID_PARAMETER, "exactly one"),
    ],
)
async def test_what_cannot_be_enforced_fails_with_a_code_and_others_go_on(harness, asked, code, says):
    worker = await harness()
    good = job("good", {"choice": ["left", "right"]})
    raw = msgpack.packb({"id": "bad", "prompt": "x", "sampling": {"structured_outputs": asked}})
    await worker.push(raw)
    await worker.push(good)
    end = await worker.end("bad")
    assert (end.status, end.error["code"], says in end.error["message"]) == (JobStatus.FAILED, code, True)
    assert (await worker.end("good")).status is JobStatus.FINISHED


async def test_a_grammar_that_compiles_in_the_engine_holds_up_no_other_job(harness, tiny_engine):
    engine, release = tiny_engine(), Event()
    compile_now = engine.grammars.compile
    engine.grammars.compile = lambda params: release.wait(HANGS_S) and compile_now(params)
    worker = await harness(engine)
    try:
        await worker.push(job("slow", {"choice": ["left", "right"]}))
        await wait_until_async(lambda: engine.stats().num_waiting == 1, what="a sequence that compiles")
        for number in range(3):
            await worker.push(Job(id=f"free-{number}", prompt="Say it: ", sampling={"max_tokens": 3}))
            assert (await worker.end(f"free-{number}")).status is JobStatus.FINISHED
    finally:
        release.set()
    assert (await worker.end("slow")).status is JobStatus.FINISHED


async def test_an_empty_mask_fails_the_job_with_its_code(harness):
    worker = await harness()
    await worker.push(job("stuck", {"regex": "ab"}, stop_token_ids=[ord("b") - 33]))
    await worker.push(job("good", {"choice": ["left", "right"]}))
    end = await worker.end("stuck")
    assert (end.status, end.error["code"]) == (JobStatus.FAILED, ErrorCode.GRAMMAR_FAILED)
    assert (await worker.end("good")).status is JobStatus.FINISHED


async def test_a_job_with_a_committed_beginning_goes_on_within_its_grammar(harness, tiny_engine):
    worker = await harness()
    await worker.push(job("whole", {"json": SCHEMA}, seed=11))
    events = await worker.events("whole")
    whole = [token_id for event in events[:-1] for token_id in event.token_ids]
    assert whole[-1] == EOS_TOKEN_ID
    await worker.stop()
    # The same job in the engine, with each beginning of what was committed.

    engine = tiny_engine()
    params = job("whole", {"json": SCHEMA}, seed=11).sampling
    for position in range(0, len(whole), 5):
        engine.add(
            EngineRequest(
                str(position), engine.tokenizer.encode("Say it: "), params, output_token_ids=whole[:position]
            )
        )
    rest: dict[str, list[int]] = {}
    while engine.has_unfinished:
        for output in engine.step():
            rest.setdefault(output.seq_id, []).extend(output.token_ids)
    for position, token_ids in rest.items():
        assert whole[: int(position)] + token_ids == whole
