"""`ingine generate` with several choices, schemas, tools and reasoning.

A grammar forces what the random model says.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from jsonschema import validate
from typer.testing import CliRunner, Result

from ingine.cli.main import app
from tests.engine.chat_families import FAMILIES
from tests.engine.model_outputs import NOW, tagged
from tests.engine.test_llm_messages import TOOLS
from tests.tiny_models import make_tiny_model

Generate = Callable[..., Result]
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["yes", "no"]}},
    "required": ["answer"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> Path:
    """Its template shows reasoning between `<think>` tags, and calls between `<tool_call>` tags."""
    path = tmp_path_factory.mktemp("qwen")
    return make_tiny_model(path, "qwen3", chat_template=FAMILIES["qwen3"], max_position_embeddings=4096)


@pytest.fixture
def generate(qwen: Path) -> Generate:
    def run(*args: str, says: str | None = None) -> Result:
        command = ["generate", "Hi", "--model", str(qwen), *args]
        if says is not None:
            command += ["--sampling", json.dumps({"structured_outputs": {"choice": [says]}})]
        return CliRunner().invoke(app, command)

    return run


@pytest.fixture
def tools(tmp_path: Path) -> tuple[str, str]:
    path = tmp_path / "tools.json"
    path.write_text(json.dumps(TOOLS))
    return "--tools", str(path)


@pytest.fixture
def schema(tmp_path: Path) -> tuple[str, str]:
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(SCHEMA))
    return "--schema", str(path)


@pytest.mark.parametrize("form", [(), ("--raw",)], ids=["chat", "raw"])
def test_several_choices_are_printed_under_their_indices(generate: Generate, form):
    run = generate("--n", "3", *form, says="a\nb")
    assert (run.exit_code, run.stdout) == (0, "[0]\na\nb\n[1]\na\nb\n[2]\na\nb\n")


def test_several_choices_as_json(generate: Generate):
    run = generate("--n", "2", "--json", "--seed", "7", "--max-tokens", "4")
    outputs = json.loads(run.stdout.splitlines()[-1])["outputs"]
    assert [output["index"] for output in outputs] == [0, 1]
    assert outputs[0]["token_ids"] != outputs[1]["token_ids"]
    assert [output["message"]["content"] for output in outputs] == [output["text"] for output in outputs]
    lone = generate("--json", "--seed", "8", "--max-tokens", "4")
    assert json.loads(lone.stdout.splitlines()[-1])["outputs"][0]["token_ids"] == outputs[1]["token_ids"]


@pytest.mark.parametrize("n", ["0", "129", "x"])
def test_a_wrong_number_of_choices_is_wrong_usage(generate: Generate, n):
    assert generate("--n", n).exit_code == 2


def test_a_schema_constrains_the_output(generate: Generate, schema):
    run = generate(*schema, "--max-tokens", "200", "--seed", "1")
    validate(json.loads(run.stdout), SCHEMA)


def test_reasoning_is_streamed_on_standard_error(generate: Generate):
    run = generate(says="<think>\nHm.\n</think>\n\nYes.")
    assert (run.exit_code, run.stdout, run.stderr) == (0, "Yes.\n", "Hm.\n")
    assert generate("--raw", says="<think>Hm.</think>").stdout == "<think>Hm.</think>\n"


def test_calls_are_lines_of_json(generate: Generate, tools):
    run = generate(*tools, says=f"<think>\nHm.\n</think>\n\nI look.\n{tagged(NOW)}")
    assert (run.exit_code, run.stderr) == (0, "Hm.\n")
    content, call = run.stdout.splitlines()
    call = json.loads(call)
    assert (content, call["type"], call["function"]) == (
        *("I look.", "function"),
        {"name": "now", "arguments": "{}"},
    )
    run = generate(*tools, "--json", says=tagged(NOW))
    [output] = json.loads(run.stdout.splitlines()[-1])["outputs"]
    assert output["finish_reason"] == "tool_calls"
    assert output["message"]["tool_calls"][0]["function"]["name"] == "now"


def test_calls_that_are_not_wanted_are_content(generate: Generate, tools):
    run = generate(*tools, "--tool-choice", "none", says=tagged(NOW))
    assert run.stdout == tagged(NOW) + "\n"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--schema", "missing.json"], "No such file"),
        (["--tools", "missing.json"], "No such file"),
        (["--tool-choice", "auto"], "needs --tools"),
    ],
)
def test_wrong_options_are_wrong_usage(generate: Generate, options, says):
    run = generate(*options)
    assert run.exit_code == 2 and says in run.stderr


def test_tools_need_a_chat(generate: Generate, tools):
    assert "leave out --raw" in generate(*tools, "--raw").stderr
