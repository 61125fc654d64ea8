"""Bodies that are refused: too large, too slow, not JSON, or no request."""

import asyncio
import json

import pytest

from tests.gateway.serving import serving
from tests.gateway.test_completions import ASKED, CHAT, COMPLETION
from tests.gateway.test_errors import assert_error


async def test_only_json_is_accepted(http):
    """A web page can send text or a form to another site unasked, but not this type."""
    for kind in (None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        headers = {"content-type": kind} if kind else {}
        response = await http.post(CHAT, content=json.dumps(ASKED), headers=headers)
        assert_error(response, 415, "unsupported_media_type")
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert_error(await http.post(CHAT, content="{", headers=headers), 400, "invalid_json")


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"1", b"null", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"1" * 10_000]
)
async def test_what_is_no_object_is_refused(http, raw):
    response = await http.post(CHAT, content=raw, headers={"content-type": "application/json"})
    assert_error(response, 400, "invalid_json")


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"messages": ASKED["messages"]}, "missing_parameter", "model"),
        (ASKED | {"model": 3}, "missing_parameter", "model"),
        ({"model": "tiny"}, "invalid_messages", "messages"),
        (ASKED | {"no_such": 1}, "unsupported_parameter", "no_such"),
        (ASKED | {"stream": "yes"}, "invalid_type", "stream"),
        (ASKED | {"stream_options": {}}, "invalid_parameter", "stream_options"),
        (ASKED | {"stream": True, "stream_options": 1}, "invalid_type", "stream_options"),
        (ASKED | {"stream": True, "stream_options": {"x": True}}, "unsupported_parameter", "stream_options"),
        (ASKED | {"response_format": "json"}, "invalid_parameter", "response_format"),
        (ASKED | {"temperature": -1}, "invalid_parameter", None),
        (ASKED | {"temperature": "hot"}, "invalid_type", None),
        (ASKED | {"messages": [{"role": "user", "content": "\ud800"}]}, "invalid_type", None),
    ],
)
async def test_a_request_that_cannot_run_says_why(http, worker, body, code, param):
    response = await http.post(CHAT, content=json.dumps(body), headers={"content-type": "application/json"})
    assert assert_error(response, 400, code)["param"] == param


async def test_a_text_completion_is_checked_too(http, worker):
    response = await http.post(COMPLETION, json={"model": "tiny", "prompt": [1, 2], "echo": True})
    assert assert_error(response, 400, "unsupported_parameter")["param"] == "echo"


async def test_a_body_over_the_limit(settings, worker):
    async with serving(settings.model_copy(update={"gateway_max_body_bytes": 1000})) as http:
        headers = {"content-type": "application/json"}
        response = await http.post(CHAT, content=b" " * 1001, headers=headers)
        assert_error(response, 413, "request_too_large")
        assert response.headers["connection"] == "close"

        async def parts():
            for _ in range(11):
                yield b" " * 100

        assert_error(await http.post(CHAT, content=parts(), headers=headers), 413, "request_too_large")
        assert_error(await http.post(CHAT, content=b" " * 1000, headers=headers), 400, "invalid_json")


async def test_a_job_over_the_queues_limit(settings, worker, http):
    body = ASKED | {"messages": [{"role": "user", "content": "x" * (2 << 20)}]}
    assert_error(await http.post(CHAT, json=body), 413, "job_too_large")


async def test_a_body_that_does_not_arrive(settings):
    async with serving(settings.model_copy(update={"gateway_body_timeout_s": 0.05})) as http:
        reader, writer = await asyncio.open_connection(http.base_url.host, http.base_url.port)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: 10\r\n\r\n{{".encode())
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 408 ") and b'"code":"request_timeout"' in answer
        writer.close()


async def test_more_requests_than_the_limit(settings, worker):
    async with serving(settings.model_copy(update={"gateway_max_requests": 1})) as http:
        asking = asyncio.ensure_future(http.post(CHAT, json=ASKED))
        job = await worker.take()
        response = await http.get("/v1/models")
        assert_error(response, 503, "overloaded")
        assert response.headers["retry-after"] == "1"
        assert (await http.get("/health")).status_code == 200
        await worker.run(job.id, 1)
        assert (await asking).status_code == 200
        assert (await http.get("/v1/models")).status_code == 200
