"""`ingine demo` itself, on a tiny random model: real server, real workers, a real `kill -9`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import redis
from rich.console import Console

from ingine.demo.plan import Plan, plan_for
from ingine.demo.prompts import QUESTIONS
from ingine.demo.run import run
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import ConfigError, ServerUnavailable
from tests.tiny_models import make_tiny_model
from tests.waiting import HANGS_S


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(deep_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=2048))


def deep_model(folder: Path, **options) -> Path:
    """Make a model whose steps are slow enough that no job ends before the kill."""
    return make_tiny_model(folder, num_layers=24, **options)


def short_model(folder: Path, **options) -> Path:
    return deep_model(folder, **{"max_position_embeddings": 192} | options)


def demo(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ingine.cli.main", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S)


def test_the_demo_keeps_its_promise(model):
    shown = demo("--model", model)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert "kill -9" in shown.stdout
    assert re.search(r"tokens lost +│ +0 ", shown.stdout)
    assert re.search(r"tokens repeated +│ +0 ", shown.stdout)


def test_it_leaves_nothing_on_a_server_that_is_not_its_own(model, redis_url):
    with redis.Redis.from_url(redis_url) as client:
        before = set(client.scan_iter("ingine:{demo-*"))
        assert demo("--model", model, "--redis-url", redis_url).returncode == 0
        assert set(client.scan_iter("ingine:{demo-*")) == before


def test_a_short_base_model_is_asked_what_fits(tmp_path):
    """The model has no chat template, and is too short for the questions about a report."""
    shown = demo("--model", str(short_model(tmp_path, chat_template=None)))
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert re.search(r"requests +│ +32 ", shown.stdout)


def test_a_plan_fits_the_model(tmp_path):
    plan = plan_for(short_model(tmp_path))
    assert plan.is_chat and plan.max_model_len == 192
    assert "0" not in plan.max_tokens  # a question about the report
    tokenizer = Tokenizer.from_folder(tmp_path)
    for number, max_tokens in plan.max_tokens.items():
        prompt = tokenizer.encode_chat([{"role": "user", "content": QUESTIONS[int(number)].text}])
        assert 0 < max_tokens <= 192 - len(prompt)
    assert plan.kill_after_num_tokens < sum(plan.max_tokens.values()) / 2
    assert Plan.from_line(plan.as_line().decode()) == plan


def test_a_model_that_is_too_short_for_all_questions_is_one_clear_line(tmp_path):
    shown = demo("--model", str(short_model(tmp_path, max_position_embeddings=48)))
    assert shown.returncode == 2 and "Traceback" not in shown.stderr
    assert "takes 48 tokens, and the demo's questions do not fit" in shown.stderr


@pytest.mark.parametrize(
    ("url", "error", "says"),
    [
        ("redis://127.0.0.1:1/0", ServerUnavailable, "127.0.0.1:1 cannot be reached"),
        ("redis+sentinel://127.0.0.1:1/primary/0", ConfigError, "the demo uses one server"),
        ("http://127.0.0.1", ConfigError, "the demo uses one server"),
    ],
)
def test_a_server_that_cannot_be_used_is_told_before_workers_wait_for_it(model, url, error, says):
    with pytest.raises(error, match=says):
        run(Console(), folder=Path(model), redis_url=url)


def test_a_model_that_does_not_exist_is_one_clear_line():
    shown = demo("--model", "no-such-model")
    assert shown.returncode != 0
    assert "no-such-model" in shown.stderr and "Traceback" not in shown.stderr
