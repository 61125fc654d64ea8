"""The web apps, each served by uvicorn. Skipped where their packages are not installed."""

import http.client
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from urllib.parse import quote

import pytest

from ingine.contract.record import JobStatus
from ingine.producer import ClientError, JobFailed, RateLimited
from tests.examples.conftest import EXAMPLES
from tests.servers import HOST, free_port
from tests.waiting import HANGS_S, wait_until

Connect = Callable[[], http.client.HTTPConnection]


@contextmanager
def serve(app: str, environment: dict[str, str]) -> Iterator[Connect]:
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", app, "--app-dir", EXAMPLES, "--port", str(port)]
    server = subprocess.Popen(command, env=environment)

    def connect() -> http.client.HTTPConnection:
        return http.client.HTTPConnection(HOST, port, timeout=HANGS_S)

    def answers() -> bool:
        assert server.poll() is None
        with closing(connect()) as connection:
            try:
                connection.connect()
            except ConnectionRefusedError:
                return False
            return True

    try:
        wait_until(answers)
        yield connect
    finally:
        server.terminate()
        server.wait()


@pytest.fixture(scope="module")
def fastapi_app(environment) -> Iterator[Connect]:
    pytest.importorskip("fastapi")
    pytest.importorskip("uvicorn")
    with serve("web_fastapi:app", environment) as connect:
        yield connect


@pytest.fixture(scope="module")
def django_app(environment) -> Iterator[Connect]:
    pytest.importorskip("django")
    pytest.importorskip("uvicorn")
    with serve("web_django:application", environment) as connect:
        yield connect


def ask(connect: Connect, method: str, path: str, body: object = None, **headers: str) -> tuple[int, str]:
    with closing(connect()) as connection:
        sent = None if body is None else json.dumps(body)
        connection.request(method, path, sent, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        return response.status, response.read().decode()


def events_in(text: str) -> list[dict[str, str]]:
    return [dict(line.split(": ", 1) for line in event.splitlines()) for event in text.split("\n\n") if event]


def text_of(events: list[dict[str, str]]) -> str:
    return "".join(json.loads(event["data"])["text"] for event in events if event["event"] == "token")


def test_the_whole_answer(fastapi_app):
    status, body = ask(fastapi_app, "POST", "/complete", {"message": "Hello", "max_tokens": 8})
    assert status == 200, body
    assert json.loads(body)["finish_reason"] in ("stop", "length")


def test_events_have_positions_and_an_end(fastapi_app, client):
    status, body = ask(fastapi_app, "POST", "/chat", {"message": "Hello", "max_tokens": 20})
    assert status == 200
    *tokens, end = events_in(body)
    assert end["event"] == "end" and {event["event"] for event in tokens} == {"token"}
    positions = [int(event["id"]) for event in tokens]
    assert positions == sorted(positions)
    result = client.attach(json.loads(end["data"])["job_id"]).result()
    assert text_of(tokens) == result.text


def test_whoever_comes_back_goes_on_where_he_was(fastapi_app):
    _, body = ask(fastapi_app, "POST", "/jobs", {"message": "Hello", "max_tokens": 20})
    path = f"/jobs/{json.loads(body)['job_id']}/events"
    first, *others = events_in(ask(fastapi_app, "GET", path)[1])
    rest = events_in(ask(fastapi_app, "GET", path, **{"Last-Event-ID": first["id"]})[1])
    # The number of tokens in an event depends on the speeds of model and reader.
    assert text_of(rest) == text_of(others)
    assert rest[-1] == others[-1]


def test_a_job_whose_browser_has_gone_is_cancelled(fastapi_app, client):
    client.pause()  # so that the job cannot finish first
    try:
        with closing(fastapi_app()) as connection:
            chat = json.dumps({"message": "Hello"})
            connection.request("POST", "/chat", chat, {"Content-Type": "application/json"})
            job_id = connection.getresponse().headers["X-Job-Id"]
        wait_until(lambda: client.status(job_id).status is JobStatus.CANCELLED)
    finally:
        client.resume()


def test_errors_are_statuses(fastapi_app):
    status, body = ask(fastapi_app, "GET", "/jobs/no-such-job/events")
    assert (status, json.loads(body)["error"]) == (404, "JobNotFound")
    status, body = ask(fastapi_app, "POST", "/complete", {"message": "x" * 4000})
    assert (status, json.loads(body)["code"]) == (422, "prompt_too_long")


def test_every_error_has_a_status():
    pytest.importorskip("fastapi")
    spec = importlib.util.spec_from_file_location("web_fastapi", EXAMPLES / "web_fastapi.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.status_code(RateLimited("", retry_after_s=1)) == 429
    assert module.status_code(JobFailed("", code="prompt_too_long")) == 422
    assert module.status_code(JobFailed("", code="worker_lost")) == 502
    assert module.status_code(ClientError("")) == 502


def test_django_answers_and_streams(django_app):
    status, body = ask(django_app, "GET", f"/complete?prompt={quote('The sky is')}")
    assert status == 200 and "text" in json.loads(body)
    status, body = ask(django_app, "GET", f"/stream?prompt={quote('The sky is')}")
    assert status == 200 and len(events_in(body)) > 2


def test_django_says_what_went_wrong(django_app):
    status, body = ask(django_app, "GET", "/complete?prompt=")
    assert (status, json.loads(body)["error"]) == (502, "JobFailed")
