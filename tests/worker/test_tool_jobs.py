"""Jobs whose choice of tools is enforced: from a bare XADD to the terminal event, and what is refused."""

import json

import jsonschema
import msgpack
import pytest

from ingine.contract.jobs import decode_job
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode
from tests.worker.test_worker import leave_behind

POINT = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "of": {"$ref": "#/$defs/of"}},
    "required": ["x", "of"],
    "additionalProperties": False,
    "$defs": {"of": {"enum": ["a", "b"]}},
}
LEVEL = {"type": "object", "properties": {}, "additionalProperties": False}
VALID = {"point": POINT, "level": LEVEL}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in VALID.items()
]
STRICT = [{"type": "function", "function": each["function"] | {"strict": True}} for each in TOOLS]
POINT_CHOICE = {"type": "function", "function": {"name": "point"}}


def job(job_id: str, *, tools=TOOLS, structured_outputs=None, **fields):
    sampling = {"temperature": 1.0, "seed": 5, "max_tokens": 400} | fields.pop("sampling", {})
    if structured_outputs is not None:
        sampling["structured_outputs"] = structured_outputs
    raw = {"id": job_id, "messages": [{"role": "user", "content": "hi"}], "sampling": sampling, **fields}
    return decode_job(msgpack.packb(raw | {"tools": tools}))


def calls_of(message: dict) -> list[tuple[str, dict]]:
    found = []
    for call in message["tool_calls"]:
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        jsonschema.validate(arguments, VALID[name])
        found.append((name, arguments))
    return found


@pytest.mark.parametrize("temperature", [0.0, 1.0])
async def test_what_is_enforced_is_called(harness, temperature):
    here = await harness(tool_parser="hermes")
    sampling = {"temperature": temperature}
    choices = {
        "required": {"tool_choice": "required"},
        "one": {"tool_choice": "required", "parallel_tool_calls": False},
        "named": {"tool_choice": POINT_CHOICE},
    }
    for job_id, fields in choices.items():
        await here.push(job(job_id, sampling=sampling, **fields))
    num_ended = 0
    for job_id in choices:
        end = await here.end(job_id)
        assert end.status is JobStatus.FINISHED, end.error
        if end.finish_reason == "length":  # a random model may begin call after call
            continue
        num_ended += 1
        calls = calls_of(end.message)
        assert calls and not end.message.get("content")
        assert end.finish_reason == ("stop" if job_id == "named" else "tool_calls")
        assert job_id == "required" or len(calls) == 1
        assert job_id != "named" or calls[0][0] == "point"
    assert num_ended >= 2


async def test_it_goes_on_from_each_committed_token(harness, step_by_step, tiny_engine):
    here = await harness(tool_parser="hermes")
    whole = job("whole", tool_choice="required", parallel_tool_calls=False)
    await here.push(whole)
    *tokens, end = await here.events("whole")
    calls = calls_of(end.message)
    token_ids = [token_id for event in tokens for token_id in event.token_ids]
    await here.stop()
    heir = await harness(tiny_engine(), tool_parser="hermes")
    for position in range(len(tokens) + 1):
        again = whole.model_copy(update={"id": f"at-{position}"})
        await leave_behind(heir, again, tokens[:position], number=position)
    for position in range(len(tokens) + 1):
        *rest, resumed = await heir.events(f"at-{position}")
        assert [token_id for event in rest for token_id in event.token_ids] == token_ids
        assert calls_of(resumed.message) == calls and resumed.timings["attempts"] == 2


REFUSED = {
    "both": (
        {"tool_choice": "required", "structured_outputs": {"json_object": True}},
        ErrorCode.INVALID_PARAMETER,
        "structured_outputs: the choice of tools",
    ),
    "keyword": (
        {
            "tool_choice": "required",
            "tools": [
                *TOOLS,
                {"type": "function", "function": {"name": "bad", "parameters": {"not": {"type": "string"}}}},
            ],
        },
        ErrorCode.UNSUPPORTED_GRAMMAR,
        "'bad': Unimplemented keys: [\"not\"]",
    ),
    "costly": (
        {
            "tool_choice": "required",
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "bad",
                        "parameters": {"properties": {f"p{index}": {} for index in range(1_000)}},
                    },
                }
            ],
        },
        ErrorCode.GRAMMAR_TOO_COSTLY,
        "'bad'",
    ),
    "strict": ({"tools": STRICT, "tool_parser": "generic"}, ErrorCode.UNSUPPORTED_GRAMMAR, "leave it out"),
    "parallel": (
        {"parallel_tool_calls": False, "tool_parser": "qwen3_coder"},
        ErrorCode.INVALID_PARAMETER,
        "hermes, mistral: leave it out",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_what_cannot_be_enforced_is_refused_by_name(harness, name):
    fields, code, says = REFUSED[name]
    fields = dict(fields)
    here = await harness(tool_parser=fields.pop("tool_parser", "hermes"))
    await here.push(job("bad", **fields))
    await here.push(job("good", tool_choice=POINT_CHOICE))
    end = await here.end("bad")
    assert (end.status, end.error["code"], says in end.error["message"]) == (JobStatus.FAILED, code, True), (
        end.error
    )
    assert (await here.end("good")).status is JobStatus.FINISHED


async def test_the_jobs_own_grammar_holds_where_the_model_is_free_to_call(harness):
    here = await harness(tool_parser="hermes")
    asked = {"choice": ["left", "right"]}
    await here.push(job("auto", structured_outputs=asked))
    await here.push(job("none", tools=STRICT, tool_choice="none", structured_outputs=asked))
    for job_id in ("auto", "none"):
        assert await here.text(job_id) in ("left", "right")
