"""Commands with tools, schemas and messages: what is submitted, what is printed, and what is refused."""

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgpack import Timestamp
from redis.asyncio import Redis

from ingine.contract.events import TokensEvent
from ingine.contract.keys import Keys
from ingine.message import Message, MessageDelta, ToolCall
from tests.producer.conftest import Ingine, Server
from tests.producer.fake_worker import FakeWorker
from tests.producer.test_cli import queued
from tests.producer.test_messages import DELTAS, TOOL, WHOLE, commit

SCHEMA = {"type": "object", "properties": {"ä": {"type": "integer"}}, "required": ["ä"]}
CALLS = WHOLE.to_openai()["tool_calls"]


@pytest.fixture
async def redis(valkey: Server) -> AsyncIterator[Redis]:
    async with valkey.connect() as connection:
        yield connection


def written(folder: Path, name: str, content: object) -> str:
    path = folder / name
    path.write_text(json.dumps(content))
    return str(path)


async def test_a_schema_constrains_the_output(ingine: Ingine, redis: Redis, keys: Keys, tmp_path: Path):
    schema = SCHEMA
    for _ in range(50):  # deeper than a job may be nested
        schema = {"type": "array", "items": schema}
    path = written(tmp_path, "schema.json", schema)
    finished = await ingine("submit", "hi", "--schema", path, "--n", "3", "--sampling", '{"logprobs": 2}')
    assert finished.exit_status == 0, finished.stderr
    sampling = (await queued(redis, keys)).sampling
    assert json.loads(sampling.structured_outputs.json_schema) == schema
    assert (sampling.n, sampling.logprobs) == (3, 2)


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ([], None),
        (["--tool-choice", "required"], "required"),
        (["--tool-choice", "none"], "none"),
        (["--tool-choice", "f"], "f"),
    ],
)
async def test_tools_are_those_of_the_job(
    ingine: Ingine, redis: Redis, keys: Keys, tmp_path: Path, choice, expected
):
    finished = await ingine("submit", "hi", "--tools", written(tmp_path, "tools.json", [TOOL]), *choice)
    assert finished.exit_status == 0, finished.stderr
    job = await queued(redis, keys)
    assert job.tools == (TOOL,)
    assert getattr(getattr(job.tool_choice, "function", None), "name", job.tool_choice) == expected


async def test_content_calls_and_reasoning_are_printed_apart(ingine: Ingine, worker: FakeWorker):
    await ingine("submit", "hi", "--job-id", "mine")
    await worker.take()
    events = [
        TokensEvent(number, [number], f"<{number}>", delta=delta.to_openai())
        for number, delta in enumerate(DELTAS, 1)
    ]
    await commit(worker, "mine", *events)
    await worker.end("mine", 5, finish_reason="tool_calls", message=WHOLE.to_openai())
    finished = await ingine("stream", "mine")
    content, *calls = finished.stdout.splitlines()
    assert (finished.exit_status, content, finished.stderr) == (0, "Let me see.", "hm\n")
    assert [json.loads(call) for call in calls] == CALLS
    finished = await ingine("stream", "mine", "--json", "--from", "1")
    chunks = [json.loads(line) for line in finished.stdout.splitlines()]
    assert [chunk["delta"] for chunk in chunks] == [delta.to_openai() for delta in DELTAS[1:]]
    assert [chunk["text"] for chunk in chunks] == ["<2>", "<3>", "<4>", "<5>"]


async def test_what_is_not_json_in_a_log_is_printed_as_text(ingine: Ingine, worker: FakeWorker):
    await ingine("submit", "hi", "--job-id", "mine")
    await worker.take()
    delta = {"content": "x", b"k\xff": [{b"\xfe": 1}], "time": Timestamp(5), 7: b"\xff"}
    await commit(worker, "mine", TokensEvent(1, [7], "x", delta=delta))
    await worker.end("mine", 1, finish_reason="stop", message=Message("x").to_openai())
    finished = await ingine("stream", "mine", "--json")
    assert (finished.exit_status, finished.stderr) == (0, "")
    [chunk] = [json.loads(line) for line in finished.stdout.splitlines()]
    assert chunk["delta"]["content"] == "x" and chunk["delta"]["7"] == "\\xff"
    assert chunk["delta"]["k\\xff"] == [{"\\xfe": 1}]


async def test_unknown_fields_of_a_call_are_not_printed(ingine: Ingine, worker: FakeWorker):
    """They need not be JSON: a newer version or any other client has written them."""
    await ingine("submit", "hi", "--job-id", "mine")
    await worker.take()
    message = Message("x", "", [ToolCall("call_1", "f", "{}")]).to_openai()
    [call] = message["tool_calls"]
    more = {"time": Timestamp(5), b"k\xff": b"\xff"}
    forged = call | more | {"function": call["function"] | more}
    await commit(worker, "mine", TokensEvent(1, [7], "x", delta={"content": "x"}))
    await worker.end("mine", 1, finish_reason="tool_calls", message=message | {"tool_calls": [forged]} | more)
    finished = await ingine("stream", "mine")
    assert (finished.exit_status, finished.stderr) == (0, "")
    content, printed = finished.stdout.splitlines()
    assert (content, json.loads(printed)) == ("x", call)


async def test_several_messages_are_printed_under_their_indices(ingine: Ingine, worker: FakeWorker):
    await ingine("submit", "hi", "--job-id", "two", "--n", "2")
    await worker.take()
    first, second = Message("", "hm", [ToolCall("call_1", "f", "{}")]).to_openai(), Message("two\nlines")
    events = [
        TokensEvent(1, [7], "x", None, 0, 1, "tool_calls", message=first),
        TokensEvent(2, [7], "y", None, 1, 1, "stop", message=second.to_openai()),
    ]
    for event, delta in zip(events, [MessageDelta(reasoning="hm"), MessageDelta("two\nlines")], strict=True):
        event.delta = delta.to_openai()
    await commit(worker, "two", *events)
    reasons = ("tool_calls", "stop")
    ends = [{"index": i, "finish_reason": reasons[i], "num_output_tokens": 1} for i in range(2)]
    await worker.end("two", 2, finish_reason="tool_calls", choices=ends)
    finished = await ingine("stream", "two")
    assert finished.exit_status == 0
    call = '{"id": "call_1", "type": "function", "function": {"name": "f", "arguments": "{}"}}'
    assert finished.stdout == f"[0]\n{call}\n[1]\ntwo\nlines\n"
    assert finished.stderr == "hm\n"


WRONG_FILES = {
    "missing": (None, "No such file"),
    "not JSON": ("{", "is not JSON"),
    "not UTF-8": (b"\xff\xfe\xfd", "is not JSON"),
    "nested too deep": ("[" * 100_000, "is not JSON"),
    "NaN": ('{"maximum": NaN}', "NaN is no JSON"),
    "a number": ("5", "must hold"),
    "text": ('"x"', "must hold"),
}


@pytest.mark.parametrize("option", ["--schema", "--tools"])
@pytest.mark.parametrize(("content", "says"), WRONG_FILES.values(), ids=WRONG_FILES)
async def test_a_file_that_cannot_be_used_is_wrong_usage(
    ingine: Ingine, redis: Redis, keys: Keys, tmp_path: Path, option, content, says
):
    path = tmp_path / "file.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    finished = await ingine("submit", "hi", option, str(path))
    assert (finished.exit_status, finished.stdout) == (2, "")
    assert says in finished.stderr and option in finished.stderr and "Traceback" not in finished.stderr
    assert await redis.xlen(keys.jobs("normal")) == 0


@pytest.mark.parametrize(
    ("tools", "options", "says"),
    [
        ([], [], "--tools"),
        ({"tools": []}, [], "--tools"),
        (["f"], [], "--tools"),
        ([{"name": "f"}], [], "tools"),
        ([TOOL, TOOL], [], "two tools have the same name"),
        ([TOOL], ["--tool-choice", "g"], "not among the tools"),
        ([TOOL], ["--raw"], "leave out --raw"),
        (None, ["--tool-choice", "auto"], "needs --tools"),
    ],
)
async def test_wrong_tools_are_wrong_usage(
    ingine: Ingine, redis: Redis, keys: Keys, tmp_path: Path, tools, options, says
):
    given = [] if tools is None else ["--tools", written(tmp_path, "tools.json", tools)]
    finished = await ingine("submit", "hi", *given, *options)
    assert (finished.exit_status, finished.stdout) == (2, "")
    assert says in finished.stderr and "Traceback" not in finished.stderr
    assert await redis.xlen(keys.jobs("normal")) == 0


async def test_an_output_has_one_constraint(ingine: Ingine, redis: Redis, keys: Keys, tmp_path: Path):
    path = written(tmp_path, "schema.json", SCHEMA)
    for sampling, status in (
        ('{"structured_outputs": {"regex": "x"}}', 2),
        ('{"structured_outputs": null}', 0),
    ):
        finished = await ingine("submit", "hi", "--schema", path, "--sampling", sampling)
        assert finished.exit_status == status, finished.stderr
    assert await redis.xlen(keys.jobs("normal")) == 1
