"""Every error has OpenAI's shape, and an id."""

import pytest

from ingine.errors import (
    ErrorCode,
    IngineError,
    InvalidArgument,
    InvalidJob,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobNotFound,
    NoWorker,
    QueueFull,
    RateLimited,
    ServerUnavailable,
)
from ingine.gateway.errors import Refused, fault_of
from tests.gateway.serving import serving


def assert_error(response, status: int, code: str) -> dict:
    """Check the shape of an error, and return it."""
    assert response.status_code == status
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"] == response.headers["openai-request-id"] != ""
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["message"] and error["code"] == code
    return error


@pytest.mark.parametrize(
    ("error", "status", "kind", "code"),
    [
        (Refused(415, "c", "m"), 415, "invalid_request_error", "c"),
        (QueueFull("m"), 429, "rate_limit_error", "queue_full"),
        (RateLimited("m", retry_after_s=0.25), 429, "rate_limit_error", "rate_limit_exceeded"),
        (NoWorker("m"), 503, "server_error", "no_worker"),
        (ServerUnavailable("m"), 503, "server_error", "server_unavailable"),
        (JobNotFound("m"), 404, "invalid_request_error", "not_found"),
        (JobCancelled("m"), 500, "server_error", "cancelled"),
        (JobExpired("m"), 504, "server_error", "deadline_exceeded"),
        (JobFailed("m", code="engine_error"), 500, "server_error", "engine_error"),
        (JobFailed("m", code="unknown_model"), 404, "invalid_request_error", "model_not_found"),
        (JobFailed("m", code="a_code_of_tomorrow"), 400, "invalid_request_error", "a_code_of_tomorrow"),
        (InvalidJob(ErrorCode.JOB_TOO_LARGE, "m"), 413, "invalid_request_error", "job_too_large"),
        (InvalidJob(ErrorCode.PROMPT_TOO_LONG, "m"), 400, "invalid_request_error", "context_length_exceeded"),
        (InvalidArgument("m"), 400, "invalid_request_error", "invalid_parameter"),
        (IngineError("m"), 500, "server_error", "internal_error"),
    ],
)
def test_an_error_has_a_status_a_type_and_a_code(error, status, kind, code):
    fault = fault_of(error)
    assert (fault.status, fault.type, fault.code) == (status, kind, code)
    assert fault.body() == {"error": {"message": fault.message, "type": kind, "param": None, "code": code}}


@pytest.mark.parametrize("code", ErrorCode)
def test_every_code_of_a_failed_job_has_a_status(code):
    assert fault_of(JobFailed("m", code=code)).status in (400, 404, 413, 500, 504)


def test_a_client_learns_when_to_try_again():
    headers = fault_of(RateLimited("m", retry_after_s=0.25)).headers
    assert headers == {"retry-after": "1", "retry-after-ms": "250"}
    assert fault_of(QueueFull("m")).headers == {"retry-after": "2", "retry-after-ms": "2000"}
    assert fault_of(NoWorker("m")).headers == {"retry-after": "5", "retry-after-ms": "5000"}
    assert fault_of(JobExpired("m")).headers == {"x-should-retry": "false"}


def test_a_client_does_not_learn_where_the_server_is():
    fault = fault_of(ServerUnavailable("Redis at redis.internal:6379 cannot be reached"))
    assert "redis.internal" not in fault.message and fault.headers["retry-after"] == "1"


async def test_an_unknown_path(http):
    error = assert_error(await http.get("/v1/none"), 404, "not_found")
    assert error["type"] == "invalid_request_error"


async def test_a_method_that_a_path_lacks(http):
    response = await http.delete("/health")
    assert_error(response, 405, "method_not_allowed")
    assert "GET" in response.headers["allow"]


async def test_health(http):
    response = await http.get("/health")
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    other = await http.get("/health")
    assert response.headers["x-request-id"] != other.headers["x-request-id"]


async def test_without_keys_a_name_that_resolves_to_this_machine_is_refused(http):
    """A web page could otherwise read answers, after its own host name was made to mean 127.0.0.1."""
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.evil.example"):
        assert_error(await http.get("/health", headers={"host": host}), 403, "invalid_host")
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"):
        assert (await http.get("/health", headers={"host": host})).status_code == 200


async def test_serving_everyone_accepts_every_name(settings):
    async with serving(settings.model_copy(update={"gateway_without_keys": True})) as http:
        assert (await http.get("/health", headers={"host": "llm.example"})).status_code == 200
