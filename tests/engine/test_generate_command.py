"""`ingine generate`: the engine alone, in a terminal and in a pipe."""

import json

import pytest
from typer.testing import CliRunner, Result

from ingine.cli import app


@pytest.fixture
def generate(llama):
    def run(*args: str, stdin: str = "", model: str | None = None) -> Result:
        return CliRunner().invoke(
            app, ["generate", "--model", model or str(llama.path), "--max-tokens", "6", *args], input=stdin
        )

    return run


def result_of(run: Result) -> dict:
    assert run.exit_code == 0, run.output
    return json.loads(run.stdout.splitlines()[-1])


def test_the_text_is_streamed_and_is_what_json_has(generate):
    expected = result_of(generate("Hi", "--json"))["outputs"][0]["text"]
    run = generate("Hi")
    assert run.exit_code == 0
    assert run.stdout == expected + "\n"


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


def test_an_unknown_model_is_a_sentence(generate):
    run = generate("Hi", model="no-such-model")
    assert "no-such-model is no packaged model" in str(run.exception)
