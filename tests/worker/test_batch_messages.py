"""Messages end to end: a batch, a stream and a command, from a file in OpenAI's format to a worker and back.

A grammar forces what the random model writes, so that it calls functions and reasons.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import validate

from ingine.message import MessageAssembly, MessageDelta
from ingine.producer import AsyncClient
from ingine.producer.batch import Batch, BatchSummary
from ingine.producer.batch_input import InputFile
from tests.producer.conftest import start
from tests.producer.openai_types import check_body
from tests.producer.test_batch import Files, Quiet
from tests.worker.test_message_jobs import CALL_F, PARSERS, TOOLS, USER, WHOLE

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {
        "answer": {"enum": ["yes", "no"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["answer", "count"],
    "additionalProperties": False,
}
RESPONSE_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA, "strict": True}}


def forced(text: str) -> dict[str, Any]:
    return {"structured_outputs": {"choice": [text]}}


def request(name: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    given = {"messages": [USER]} if url == CHAT else {"prompt": "Hi"}
    body = {"model": "tiny", "max_completion_tokens": 200, "seed": 7} | given | body
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


LINES = [
    request("text", max_completion_tokens=5, response_format={"type": "text"}),
    request("schema", response_format=RESPONSE_FORMAT, n=2),
    request("object", response_format={"type": "json_object"}, max_completion_tokens=20),
    request("tools", tools=TOOLS, n=2, **forced(WHOLE)),
    request("one call", tools=TOOLS, tool_choice="auto", **forced(CALL_F), logprobs=True, top_logprobs=2),
    request("no call", tools=TOOLS, tool_choice="none", **forced(CALL_F)),
    request("cut", tools=TOOLS, **forced(WHOLE), max_completion_tokens=len(WHOLE) - 20),
    request("completion", COMPLETIONS, logprobs=2, n=2, bad_words=["x"], **forced("abcd")),
    request("continued", COMPLETIONS, response_format=RESPONSE_FORMAT, echo=True),
    request("bad format", response_format={"type": "yaml"}),
    request("bad schema", response_format={"type": "json_schema", "json_schema": {"schema": {"type": 5}}}),
    request("bad tool", tools=[{"type": "custom", "custom": {"name": "f"}}]),
]


async def run(client: AsyncClient, files: Files) -> BatchSummary:
    batch = Batch(client, InputFile(files.input), files.output, files.errors, progress=Quiet(), window=64)
    return await batch.run()


async def test_a_batch_with_tools_and_response_formats(harness, redis_url, queue, tmp_path: Path):
    await harness(**PARSERS)
    files = Files(tmp_path)
    files.write(*LINES)
    async with AsyncClient(redis_url, queue=queue) as client:
        summary = await run(client, files)
    output, errors = files.rows()
    assert summary.num_lines == len(LINES) == len(output) + len(errors)
    for row in output:
        check_body(row["response"]["body"])
    choices = {row["custom_id"]: row["response"]["body"]["choices"] for row in output}
    faults = {row["custom_id"]: row["response"]["body"]["error"] for row in errors}

    assert {name: fault["code"] for name, fault in faults.items()} == {
        "bad format": "invalid_parameter",
        "bad schema": "invalid_grammar",
        "bad tool": faults["bad tool"]["code"],
    }
    assert "tools" in faults["bad tool"]["message"]

    assert choices["text"][0]["finish_reason"] == "length"
    for choice in choices["schema"]:
        validate(json.loads(choice["message"]["content"]), SCHEMA)
    assert [choice["index"] for choice in choices["schema"]] == [0, 1]
    assert choices["object"][0]["message"]["content"].startswith("{")

    ids = set()
    for choice in choices["tools"]:
        message = choice["message"]
        assert (message["content"], message["reasoning"]) == ("So", "hm")
        assert choice["finish_reason"] == "tool_calls"
        [call] = message["tool_calls"]
        assert (call["type"], call["function"]) == ("function", {"name": "f", "arguments": '{"a": 1}'})
        ids.add(call["id"])
    assert len(ids) == 2

    [choice] = choices["one call"]
    assert choice["message"]["content"] is None and len(choice["message"]["tool_calls"]) == 1
    tokens = choice["logprobs"]["content"]
    assert b"".join(bytes(token["bytes"]) for token in tokens).startswith(CALL_F.encode())
    assert all(len(token["top_logprobs"]) == 2 for token in tokens)
    [choice] = choices["no call"]
    assert (choice["message"]["content"], choice["finish_reason"]) == (CALL_F, "stop")
    assert "tool_calls" not in choice["message"]
    [choice] = choices["cut"]
    [call] = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "length" and not call["function"]["arguments"].endswith("}")

    for choice in choices["completion"]:
        logprobs = choice["logprobs"]
        assert choice["text"] == "abcd" == "".join(logprobs["tokens"][:4])
        assert logprobs["text_offset"][:4] == [0, 1, 2, 3]
        assert len(logprobs["token_logprobs"]) == len(logprobs["tokens"])
    text = choices["continued"][0]["text"]
    validate(json.loads(text.removeprefix("Hi")), SCHEMA)


async def test_a_stream_has_the_deltas_of_the_message(harness, redis_url, queue):
    await harness(**PARSERS)
    async with AsyncClient(redis_url, queue=queue) as client:
        job = await client.submit(messages=[USER], tools=TOOLS, max_tokens=200, n=2, **forced(WHOLE))
        assemblies = [MessageAssembly(), MessageAssembly()]
        async for chunk in job.stream():
            assert chunk.parsed is not None
            assemblies[chunk.index].add(MessageDelta.from_openai(chunk.delta))
        result = await job.result()
    messages = [assembly.message().to_openai() for assembly in assemblies]
    assert messages == [choice.message for choice in result.choices]
    assert result.message["tool_calls"][0]["function"] == {"name": "f", "arguments": '{"a": 1}'}


@pytest.mark.parametrize("text", [WHOLE, "<think>hm</think>", "So"], ids=["calls", "reasons", "says"])
async def test_a_command_prints_a_message(harness, redis_url, queue, tmp_path: Path, text: str):
    await harness(**PARSERS)
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps(TOOLS))
    options = ("--tools", str(tools), "--sampling", json.dumps(forced(text)), "--max-tokens", "200")
    process = await start("submit", "Hi", "--stream", *options, "--redis-url", redis_url, "--queue", queue)
    stdout, stderr = (each.decode() for each in await process.communicate())
    assert process.returncode == 0, stderr
    assert stderr == ("hm\n" if "think" in text else "")
    content, *calls = stdout.splitlines() or [""]
    assert content == ("So" if "So" in text else "")
    assert [json.loads(call)["function"]["name"] for call in calls] == (["f"] if text == WHOLE else [])
