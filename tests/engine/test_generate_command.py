"""`ingine generate`: the engine alone, in a terminal and in a pipe."""

import json
import sys

import pytest
from typer.testing import CliRunner, Result

from ingine.cli.main import app
from ingine.engine.engine import Engine
from ingine.errors import ErrorCode


@pytest.fixture
def generate(llama):
    def run(*args: str, stdin: str = "", model: str | None = None) -> Result:
        sampling = ("--temperature", "0", "--max-tokens", "6")
        command = ["generate", "--model", model or str(llama.path), *sampling, *args]
        return CliRunner().invoke(app, command, input=stdin)

    return run


def result_of(run: Result) -> dict:
    assert run.exit_code == 0, run.output
    return json.loads(run.stdout.splitlines()[-1])


def test_the_text_is_streamed_and_is_what_json_has(generate, monkeypatch):
    expected = result_of(generate("Hi", "--json"))["outputs"][0]["text"]
    shown = []

    def watched(engine: Engine, step=Engine.step):
        shown.append(sys.stdout.buffer.getvalue().decode())  # what the terminal has before this step
        return step(engine)

    monkeypatch.setattr(Engine, "step", watched)
    run = generate("Hi")
    assert run.exit_code == 0
    assert run.stdout == expected + "\n"
    assert all(expected.startswith(text) for text in shown)
    assert len(set(shown)) > 3  # it grew while tokens were still to come


def test_output_that_length_has_cut_says_so_on_stderr(generate):
    for form in ((), ("--json",)):
        run = generate("Hi", *form)
        assert "cut at 6 tokens (finish_reason: length)" in run.stderr
    text = result_of(run)["outputs"][0]["text"]
    run = generate("Hi", "--stop", text[2])
    assert (run.exit_code, run.stderr) == (0, "")


def test_the_prompt_is_a_chat_message_or_with_raw_as_it_is(generate, llama):
    chat = [{"role": "user", "content": "Hi"}]
    assert result_of(generate("Hi", "--json"))["prompt_token_ids"] == llama.tokenizer.encode_chat(chat)
    assert result_of(generate("Hi", "--raw", "--json"))["prompt_token_ids"] == llama.tokenizer.encode("Hi")


def test_the_prompt_may_be_piped_in(generate):
    piped = result_of(generate("--raw", "--json", stdin="Hi there\n"))
    assert piped["prompt"] == "Hi there"
    assert piped["usage"]["num_output_tokens"] == 6


def test_a_seed_repeats_what_it_drew(generate):
    first, second, third = (
        result_of(generate("Hi", "--temperature", "2", "--seed", seed, "--json"))["outputs"][0]["token_ids"]
        for seed in ("1", "1", "2")
    )
    assert first == second != third


def test_a_wrong_parameter_is_named(generate):
    run = generate("Hi", "--top-p", "3")
    assert run.exit_code == 2
    assert "top_p" in run.output


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["text", "json"])
def test_a_prompt_that_is_too_long_is_refused(generate, form):
    run = generate("--raw", "x" * 600, *form)
    assert run.exception.code is ErrorCode.PROMPT_TOO_LONG


def test_an_unknown_model_is_a_sentence(generate):
    run = generate("Hi", model="no-such-model")
    assert "no-such-model is no packaged model" in str(run.exception)


def test_any_sampling_parameter_can_be_given_as_json(generate):
    expected = result_of(generate("Hi", "--raw", "--json"))
    fields = json.dumps({"truncate_prompt_tokens": 1, "logit_bias": {"70": 100}, "max_tokens": 99})
    result = result_of(generate("Hi", "--raw", "--json", "--sampling", fields))
    assert result["prompt_token_ids"] == expected["prompt_token_ids"][-1:]
    assert result["outputs"][0]["token_ids"] == [70] * 6  # the option is over the object
    streamed = generate("Hi", "--raw", "--sampling", fields)
    assert streamed.stdout == result["outputs"][0]["text"] + "\n"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("{", "not JSON"),
        ("[]", "must be an object"),
        ('{"top": 1}', "top"),
        ('{"best_of": 3}', "not supported"),
    ],
)
def test_wrong_json_is_wrong_usage(generate, text, says):
    run = generate("Hi", "--sampling", text)
    assert run.exit_code == 2 and says in run.stderr
