"""Pyright finds no fault in our examples, in an environment with the wheel installed."""

import ast
import inspect
import json
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from ingine.sampling_params import SamplingParams
from tests.builds import ROOT, build_wheel, install, make_environment
from tests.waiting import HANGS_S

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "examples" / "README.md"]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)
EXAMPLES = {f"example_{path.stem}": path.read_text() for path in sorted((ROOT / "examples").glob("*.py"))} | {
    "_".join((*path.relative_to(ROOT).with_suffix("").parts, str(number))): block
    for path in DOCUMENTS
    for number, block in enumerate(BLOCK.findall(path.read_text()), 1)
}

EXACT = """
from collections.abc import AsyncGenerator, Generator
from contextlib import aclosing, closing
from typing import Any, assert_type

from ingine import LLM, AsyncClient, Client, RequestOutput, SamplingParams
from ingine.producer import AsyncJobHandle, Chunk, JobHandle, JobInfo, QueuedJob, QueueInfo, Reply, Result


def blocking(client: Client) -> None:
    job = client.submit("hi", sampling=SamplingParams(temperature=0, max_tokens=8), priority="low")
    assert_type(job, JobHandle)
    assert_type(job.job_id, str)
    assert_type(job.stream(), Generator[Chunk, None, None])
    with closing(job.stream(from_position=3)) as chunks:
        assert_type(next(chunks).token_ids, list[int])
    assert_type(job.result(timeout=3, cancel=True), Result)
    assert_type(job.result().choices[0].message, dict[str, Any])
    assert_type(job.cancel(), str)
    assert_type(job.status(), JobInfo)
    assert_type(client.submit_many([{"prompt": "hi"}, {"prompt": [1, 2]}]), list[JobHandle])
    assert_type(client.attach("id", from_position=3), JobHandle)
    assert_type(client.replies("name"), Generator[Reply, None, None])
    assert_type(client.status("id"), JobInfo)
    assert_type(client.jobs(tenant="acme"), list[QueuedJob])
    assert_type(client.queue_info(), QueueInfo)
    assert_type(client.purge(), int)


async def asynchronous(client: AsyncClient) -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    job = await client.submit(
        messages=[{"role": "user", "content": "hi"}], tools=tools, tool_choice="required", max_tokens=8
    )
    assert_type(job, AsyncJobHandle)
    assert_type(job.stream(), AsyncGenerator[Chunk, None])
    async with aclosing(job.stream()) as chunks:
        async for chunk in chunks:
            assert_type(chunk.text, str)
            assert_type(chunk.delta, dict[str, Any])
    assert_type(await job.result(timeout=3, cancel=True), Result)
    assert_type(await job.cancel(), str)
    assert_type(await client.submit_many([{"prompt": "hi"}]), list[AsyncJobHandle])
    assert_type(client.replies("name"), AsyncGenerator[Reply, None])


def sampling() -> None:
    params = SamplingParams(temperature=None, stop="\\n", stop_token_ids=[2], logit_bias={5: -100})
    assert_type(params.stop, tuple[str, ...])
    assert_type(SamplingParams(stop=["a", "b"]).temperature, float)


def engine(llm: LLM) -> None:
    outputs = llm.generate(["hi"], SamplingParams(max_tokens=8))
    assert_type(outputs, list[RequestOutput])
    assert_type(outputs[0].outputs[0].text, str)
"""

WRONG = """
from ingine import Client, SamplingParams
from ingine import NoSuchName  # wrong
from ingine.producer import NoSuchError  # wrong

client = Client(quue="chat")  # wrong
client.submit("hi", priority=7)  # wrong
client.submit("hi", sampling=SamplingParams(max_token=7))  # wrong
client.cancel()  # wrong
client.jobs(5)  # wrong
client.submit("hi").result(until=3)  # wrong
for chunk in client.submit("hi").stream():
    print(chunk.txt)  # wrong
"""


@pytest.fixture(scope="module")
def faults(tmp_path_factory) -> dict[str, dict[int, str]]:
    """Pyright's findings in each example, by line."""
    folder = tmp_path_factory.mktemp("types")
    python = make_environment(folder / "venv")
    install(python, build_wheel(folder / "wheel"))
    project = folder / "project"
    project.mkdir()
    (project / "pyrightconfig.json").write_text(json.dumps({"typeCheckingMode": "standard"}))
    for name, code in (EXAMPLES | {"exact": EXACT, "wrong": WRONG}).items():
        (project / f"{name}.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "basedpyright", "--outputjson", "--pythonpath", python, "--project", project],
        capture_output=True,
        text=True,
        timeout=HANGS_S,
    )
    found = json.loads(done.stdout)
    assert found["summary"]["filesAnalyzed"] == len(EXAMPLES) + 2, done.stdout
    faults = defaultdict(dict)
    for each in found["generalDiagnostics"]:
        if each.get("rule") == "reportMissingImports" and '"ingine' not in each["message"]:
            continue  # a web framework that this environment lacks
        faults[Path(each["file"]).stem][each["range"]["start"]["line"] + 1] = each["message"]
    return faults


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_has_no_type_errors(faults, name):
    assert faults[name] == {}


def test_all_methods_have_the_types_that_they_say(faults):
    assert faults["exact"] == {}


def test_sampling_params_are_made_with_the_fields_that_they_have():
    """The constructor is written out for type checkers."""
    classes = ast.walk(ast.parse(inspect.getsource(SamplingParams)))
    (written,) = (node.args for node in classes if getattr(node, "name", None) == "__init__")
    defaults = [ast.literal_eval(default) for default in written.kw_defaults]
    fields = {name: field.default for name, field in SamplingParams.model_fields.items()}
    assert dict(zip([each.arg for each in written.kwonlyargs], defaults, strict=True)) == fields


def test_mistakes_are_found(faults):
    wrong = {number for number, line in enumerate(WRONG.splitlines(), 1) if line.endswith("# wrong")}
    assert faults["wrong"].keys() == wrong, faults["wrong"]


def test_there_are_examples():
    assert {"README_1", "README_2", "example_quickstart"} <= EXAMPLES.keys()
