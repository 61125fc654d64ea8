"""A worker with a model, a gateway, and OpenAI's own Python client, each in a process of its own."""

import json
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from ingine.gateway.keys import create_key
from ingine.worker.local import LocalWorkers
from tests.gateway.processes import gateway_process
from tests.tiny_models import make_tiny_model
from tests.waiting import HANGS_S

CLIENT = "openai==3.57.0"
PROGRAM = Path(__file__).with_name("openai_program.py")
QUEUE = "openai-client"


@pytest.fixture(scope="module")
def openai_python(tmp_path_factory) -> Path:
    """The interpreter of an environment with OpenAI's client and nothing of ours."""
    folder = tmp_path_factory.mktemp("openai")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python, "install"]
    done = subprocess.run([*command, "--quiet", CLIENT], capture_output=True, text=True, timeout=HANGS_S)
    if done.returncode != 0:
        pytest.skip(f"{CLIENT} cannot be installed: {done.stderr[-200:]}")
    return python


@pytest.fixture(scope="module")
def found(redis_url, tmp_path_factory, openai_python) -> dict:
    """What the client's program has printed."""
    folder = tmp_path_factory.mktemp("served")
    model = make_tiny_model(folder / "tiny", num_layers=4)
    keys = folder / "keys.json"
    _, key = create_key(keys, tenant="acme", models=None)
    workers = LocalWorkers(
        ["gateway"],
        redis_url=redis_url,
        queue=QUEUE,
        folder=folder,
        num_threads=1,
        model=model,
        dtype="float32",
    )
    # Pings come all the time, so that the client reads many beside ids of events.
    with workers, gateway_process(folder, redis_url, QUEUE, keys=keys, ping_s=0.005) as gateway:
        command = [openai_python, PROGRAM, f"{gateway.url}/v1", key, "tiny"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=HANGS_S)
        assert done.returncode == 0, done.stderr + gateway.log_text
        return json.loads(done.stdout)


def test_a_whole_answer(found):
    assert found["models"] == ["tiny"]
    assert found["text"] and found["reason"] in ("length", "stop")
    assert found["request_id"] == found["id"] and found["id"].startswith("chatcmpl-")


def test_a_stream_adds_up_to_the_whole_answer(found):
    assert found["stream_text"] == found["helper_text"] == found["text"]
    assert found["stream_reasons"] == [found["reason"]]
    assert found["stream_usage"] == [found["usage"]] == [found["num_logprobs"]]
    assert found["completion_stream"] == found["completion"] != ""


def test_no_choice_of_a_stream_is_lost(found):
    assert found["choices_streamed"] == found["choices_whole"]
    assert len(set(found["choices_whole"])) == 3


def test_responses(found):
    assert found["response_text"] == found["response_stream"] == found["response_helper"] == found["text"]
    assert found["response_status"] in ("completed", "incomplete")
    assert found["background_text"] == found["background_whole"] == found["text"]
    assert found["rest"] == found["expected_rest"] != []
    # The tiny model may have filled its whole length before the cancellation came.
    assert found["cancelled"] in ("cancelled", "incomplete", "completed")


def test_errors_are_those_that_programs_look_for(found):
    errors = found["errors"]
    assert errors["model"]["kind"] == "NotFoundError" and errors["model"]["code"] == "model_not_found"
    assert errors["field"] == {
        "kind": "BadRequestError",
        "code": "unsupported_parameter",
        "param": "no_such",
        "type": "invalid_request_error",
    }
    assert (errors["long"]["kind"], errors["long"]["code"]) == ("BadRequestError", "context_length_exceeded")
    assert (errors["key"]["kind"], errors["key"]["code"]) == ("AuthenticationError", "invalid_api_key")
