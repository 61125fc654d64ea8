"""Which formats a worker reads messages in: those of its settings, or else those of its model."""

from types import SimpleNamespace

import pytest

from ingine.cli.worker import _served_model
from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.parsers.choice import ModelFormats
from ingine.engine.parsers.reasoning import REASONING_TAGS
from ingine.engine.parsers.tool_formats import TOOL_FORMATS
from ingine.errors import ConfigError
from ingine.message import Message
from ingine.worker.message_formats import worker_formats
from ingine.worker.settings import WorkerSettings, load_settings
from tests.tiny_models import CHAT_TEMPLATE, make_tiny_model
from tests.worker.test_message_jobs import PARSERS, WHOLE, chat, said

SHOWS_REASONING = "{# </think> #}"


async def test_a_chat_template_shows_the_tags_and_that_reasoning_has_begun(harness, tmp_path):
    template = CHAT_TEMPLATE.replace("assistant\n", "assistant\n<think>\n") + SHOWS_REASONING
    model = make_tiny_model(tmp_path, chat_template=template)
    options = {"dtype": "float32", "device": "cpu", "max_num_seqs": 4, "kv_cache_bytes": 8 << 20}
    engine = Engine(EngineConfig(str(model), **options))
    worker = await harness(engine)
    letters = tuple(engine.tokenizer.encode("abcdefgh"))
    sampling = {"allowed_token_ids": letters, "max_tokens": 24}
    await worker.push(chat(sampling=sampling))
    await worker.push(chat("b", tools=None, sampling=sampling))
    for job_id in ("a", "b"):
        text, end = await worker.text(job_id), await worker.end(job_id)
        assert len(text) == 24 and end.message == Message("", text).to_openai()


async def test_reasoning_is_content_where_the_settings_say_so(harness):
    worker = await harness(tool_parser="hermes", reasoning_parser="none")
    await worker.push(said(WHOLE))
    end = await worker.end("a")
    assert end.message["content"] == "<think>hm</think>So" and "reasoning" not in end.message


HOST = SimpleNamespace(model_type="qwen3", tokenizer=SimpleNamespace(chat_template="{{ '</think>' }}"))
PLAIN_HOST = SimpleNamespace(model_type="llama", tokenizer=SimpleNamespace(chat_template=None))


@pytest.mark.parametrize(
    ("host", "given", "expected"),
    [
        (HOST, {}, ModelFormats("hermes", "think")),
        (HOST, {"tool_parser": "mistral"}, ModelFormats("mistral", "think")),
        (HOST, {"reasoning_parser": "mistral"}, ModelFormats("hermes", "mistral")),
        (HOST, {"reasoning_parser": "none"}, ModelFormats("hermes", None)),
        (PLAIN_HOST, {}, ModelFormats("generic", None)),
        (PLAIN_HOST, {"reasoning_parser": "think"}, ModelFormats("generic", "think")),
        (SimpleNamespace(tokenizer=None), PARSERS, None),
    ],
)
def test_settings_come_before_the_formats_of_the_model(host, given, expected):
    assert worker_formats(host, WorkerSettings(_env_file=None, **given)) == expected


def test_parsers_that_the_settings_name_are_in_the_fingerprint(tiny_model):
    """So workers that would write other deltas do not share a queue."""
    plain, named = (
        _served_model(settings, str(tiny_model), "float32")
        for settings in (load_settings(), load_settings(**PARSERS))
    )
    assert named.fingerprint == f"{plain.fingerprint},tools-hermes,reasoning-think"
    assert named.same_weights(plain.fingerprint)


def test_every_format_can_be_named():
    for name in TOOL_FORMATS:
        assert load_settings(tool_parser=name).tool_parser == name
    for name in (*REASONING_TAGS, "none"):
        assert load_settings(reasoning_parser=name).reasoning_parser == name


@pytest.mark.parametrize("name", ["tool_parser", "reasoning_parser"])
def test_an_unknown_parser_is_named_with_those_that_there_are(name):
    with pytest.raises(
        ConfigError, match=rf"INGINE_{name.upper()} \(--{name.replace('_', '-')}\).*'mistral'"
    ):
        load_settings(**{name: "gpt"})
