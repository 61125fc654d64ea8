"""`ingine demo` itself, on a tiny random model: real server, real workers, a real `kill -9`."""

import re
import subprocess
import sys

import pytest
import redis

from tests.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("tiny"), max_position_embeddings=2048))


def demo(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "ingine.cli", "demo", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=150)


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


def test_a_model_that_does_not_exist_is_one_clear_line():
    shown = demo("--model", "no-such-model")
    assert shown.returncode != 0
    assert "no-such-model" in shown.stderr and "Traceback" not in shown.stderr
