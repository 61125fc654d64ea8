"""`/v1/responses` over HTTP, with a worker that the test drives."""

import asyncio
import json
import re

import httpx2
import pytest

from ingine.contract.record import JobStatus
from ingine.gateway.keys import create_key
from tests.gateway.processes import gateway_process
from tests.gateway.serving import serving
from tests.gateway.test_completions import USAGE, answer
from tests.gateway.test_errors import assert_error
from tests.waiting import HANGS_S, wait_until_async

PATH = "/v1/responses"
ASKED = {"model": "tiny", "input": "hi", "instructions": "be brief", "max_output_tokens": 9}
BACKGROUND = ASKED | {"background": True}
NOBODYS = f"resp_{'0' * 32}"


def events_in(text: str) -> list[dict]:
    events = []
    for part in text.split("\n\n")[:-1]:
        kind, data = re.fullmatch("(?:: ping\n)*event: (.*)\ndata: (.*)", part).groups()
        events.append(json.loads(data))
        assert events[-1]["type"] == kind
    return events


async def begin(http, **fields) -> str:
    """Create a response in background, and return its id."""
    response = await http.post(PATH, json=BACKGROUND | fields)
    body = response.json()
    assert response.status_code == 200 and body["background"]
    assert body["status"] in ("queued", "in_progress")
    assert response.headers["x-request-id"] == body["id"]
    return body["id"]


async def read(http, job_id: str, **query) -> httpx2.Response:
    return await http.get(f"{PATH}/{job_id}", params=query)


async def test_a_response(http, worker):
    response, job = await asyncio.gather(http.post(PATH, json=ASKED), answer(worker, finish_reason="stop"))
    body = response.json()
    assert body.pop("created_at") > 1_700_000_000
    assert body == {
        "id": job.id,
        "object": "response",
        "status": "completed",
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": "be brief",
        "max_output_tokens": 9,
        "metadata": {},
        "model": "tiny",
        "output": [
            {
                "id": f"msg_{job.id.removeprefix('resp_')}00",
                "type": "message",
                "role": "assistant",
                "status": "completed",
                "content": [{"type": "output_text", "text": "<1><2>", "annotations": [], "logprobs": []}],
            }
        ],
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "reasoning": {"effort": None, "summary": None},
        "store": True,
        "temperature": None,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        "truncation": "disabled",
        "usage": {
            "input_tokens": 5,
            "input_tokens_details": {"cached_tokens": 4},
            "output_tokens": 2,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 7,
        },
        "user": None,
    }
    assert [(m.role, m.text) for m in job.messages] == [("system", "be brief"), ("user", "hi")]
    assert job.sampling.max_tokens == 9 and job.deadline_ms == 600_000
    assert (await read(http, job.id)).json() == response.json()


async def test_a_stream_and_what_is_read_later_are_the_same(http, worker):
    response, job = await asyncio.gather(http.post(PATH, json=ASKED | {"stream": True}), answer(worker))
    events = events_in(response.text)
    assert [events[0]["type"], events[-1]["type"]] == ["response.created", "response.incomplete"]
    assert events[-1]["response"] == (await read(http, job.id)).json()
    assert "[DONE]" not in response.text
    assert (await read(http, job.id, stream="true")).text == response.text


async def test_a_background_response_from_its_queue_to_its_end(http, worker):
    job_id = await begin(http)
    assert (await read(http, job_id)).json()["status"] == "queued"
    job = await worker.take()
    assert job.id == job_id and job.deadline_ms is None
    await worker.commit(job_id, 0, 1)
    body = (await read(http, job_id)).json()
    assert (body["status"], body["output"], body["instructions"]) == ("in_progress", [], "be brief")
    await worker.end(job_id, 1, finish_reason="stop", metadata=job.metadata, usage=USAGE)
    body = (await read(http, job_id)).json()
    assert body["status"] == "completed" and body["output"][0]["content"][0]["text"] == "<1>"
    assert body["instructions"] == "be brief" and body["background"] is True


async def test_a_stream_goes_on_after_any_event(http, worker):
    job_id = await begin(http)
    await answer(worker, 3)
    whole = (await read(http, job_id, stream="true")).text
    events = events_in(whole)
    for number, event in enumerate(events[:-1], 1):
        rest = await read(http, job_id, stream="true", starting_after=event["sequence_number"])
        assert events_in(rest.text) == events[number:]
    end = await read(http, job_id, stream="true", starting_after=events[-1]["sequence_number"])
    assert (end.status_code, end.text) == (200, "")


@pytest.mark.parametrize("after", ["x", "1.5", "--1", "9" * 20, "\u0663"])
async def test_a_number_that_is_none(http, worker, after):
    job_id = await begin(http)
    response = await read(http, job_id, stream="true", starting_after=after)
    assert assert_error(response, 400, "invalid_parameter")["param"] == "starting_after"


async def test_a_response_goes_on_without_its_client(http, worker, redis, keys):
    async with http.stream("POST", PATH, json=BACKGROUND | {"stream": True}) as response:
        text = await anext(response.aiter_text())
    assert events_in(text)[0]["type"] == "response.created"
    job = await worker.take()
    await worker.run(job.id, 1, metadata=job.metadata)
    assert await redis.hget(keys.job(job.id), "cancel") in (None, b"0")
    assert (await read(http, job.id)).json()["status"] == "incomplete"


async def test_a_client_that_waits_for_its_response_and_leaves_cancels_it(http, worker, redis, keys):
    for stream in (False, True):
        asking = asyncio.ensure_future(http.post(PATH, json=ASKED | {"stream": stream}))
        job = await worker.take()
        await worker.commit(job.id, 0, 1)
        asking.cancel()
        await wait_until_async(lambda job=job: redis.hget(keys.job(job.id), "cancel"))


async def test_cancel_before_it_begins(http, worker):
    job_id = await begin(http)
    body = (await http.post(f"{PATH}/{job_id}/cancel")).json()
    assert (body["id"], body["status"], body["output"]) == (job_id, "cancelled", [])
    assert body["instructions"] == "be brief"
    assert (await http.post(f"{PATH}/{job_id}/cancel")).json() == body


async def test_cancel_while_it_runs(http, worker, redis, keys):
    job_id = await begin(http)
    job = await worker.take()
    await worker.commit(job_id, 0, 2)
    cancelling = asyncio.ensure_future(http.post(f"{PATH}/{job_id}/cancel"))
    await wait_until_async(lambda: redis.hget(keys.job(job_id), "cancel"))
    await worker.end(job_id, 2, JobStatus.CANCELLED, metadata=job.metadata)
    body = (await cancelling).json()
    assert body["status"] == "cancelled" and body["output"][0]["content"][0]["text"] == "<1><2>"


async def test_cancel_after_its_end_changes_nothing(http, worker):
    job_id = await begin(http)
    await answer(worker)
    before = (await read(http, job_id)).json()
    assert (await http.post(f"{PATH}/{job_id}/cancel")).json() == before


async def test_a_failure(http, worker):
    error = {"code": "engine_error", "message": "why"}
    failing = {"num_tokens": 0, "status": JobStatus.FAILED, "error": error}
    for stream in (False, True):
        response, _ = await asyncio.gather(
            http.post(PATH, json=ASKED | {"stream": stream}), answer(worker, **failing)
        )
        assert_error(response, 500, "engine_error")
    job_id = await begin(http)
    await answer(worker, **failing)
    body = (await read(http, job_id)).json()
    assert (body["status"], body["error"]) == ("failed", error)
    assert events_in((await read(http, job_id, stream="true")).text)[-1]["type"] == "response.failed"


@pytest.mark.parametrize("job_id", [NOBODYS, "resp_1", "x", f"chatcmpl-{'0' * 32}"])
async def test_an_unknown_response(http, worker, job_id):
    assert_error(await read(http, job_id), 404, "not_found")
    assert_error(await read(http, job_id, stream="true"), 404, "not_found")
    assert_error(await http.post(f"{PATH}/{job_id}/cancel"), 404, "not_found")


async def test_a_stranger_sees_no_response(worker, settings, tmp_path):
    path = tmp_path / "keys.json"
    own, other = (create_key(path, tenant=tenant, models=None)[1] for tenant in ("a", "b"))
    async with serving(settings.model_copy(update={"gateway_keys": path})) as http:
        http.headers["authorization"] = f"Bearer {own}"
        job_id = await begin(http)
        assert (await read(http, job_id)).status_code == 200
        http.headers["authorization"] = f"Bearer {other}"
        assert_error(await read(http, job_id), 404, "not_found")
        assert_error(await http.post(f"{PATH}/{job_id}/cancel"), 404, "not_found")


async def test_a_response_is_read_on_at_another_gateway_after_kill_9(tmp_path, redis_url, queue, worker):
    served = (tmp_path, redis_url, queue)
    async with httpx2.AsyncClient(timeout=HANGS_S) as http:
        with gateway_process(*served) as one, gateway_process(*served) as other:
            text = ""
            with pytest.raises(httpx2.TransportError):
                asked = BACKGROUND | {"stream": True}
                async with http.stream("POST", one.url + PATH, json=asked) as response:
                    job = await worker.take()
                    await worker.commit(job.id, 0, 2)
                    async for part in response.aiter_text():
                        text += part
                        if "<1><2>" in text:
                            one.child.kill()
            before = events_in(text[: text.rindex("\n\n") + 2])
            await worker.run_from(job.id, 2, 4, metadata=job.metadata)
            query = {"stream": "true", "starting_after": before[-1]["sequence_number"]}
            rest = events_in((await http.get(f"{other.url}{PATH}/{job.id}", params=query)).text)
            whole = events_in((await http.get(f"{other.url}{PATH}/{job.id}?stream=true")).text)
    assert before + rest == whole and whole[-1]["type"] == "response.incomplete"
    assert "".join(event.get("delta", "") for event in whole) == "<1><2><3><4>"


async def test_delete_after_its_end(http, worker, redis, keys):
    job_id = await begin(http)
    await answer(worker)
    body = (await http.delete(f"{PATH}/{job_id}")).json()
    assert body == {"id": job_id, "object": "response", "deleted": True}
    assert await redis.exists(keys.job(job_id), keys.tokens(job_id)) == 0
    assert_error(await read(http, job_id), 404, "not_found")
    assert_error(await http.delete(f"{PATH}/{job_id}"), 404, "not_found")


async def test_delete_cancels_first(http, worker, redis, keys):
    job_id = await begin(http)
    assert (await http.delete(f"{PATH}/{job_id}")).json()["deleted"] is True
    assert await redis.xlen(keys.jobs("normal")) == 0
    job_id = await begin(http)
    job = await worker.take()
    deleting = asyncio.ensure_future(http.delete(f"{PATH}/{job_id}"))
    await wait_until_async(lambda: redis.hget(keys.job(job_id), "cancel"))
    await worker.end(job_id, 0, JobStatus.CANCELLED, metadata=job.metadata)
    assert (await deleting).json()["deleted"] is True


async def test_the_same_idempotency_key_finds_the_same_response(http, worker):
    headers = {"idempotency-key": "order-1"}
    first = (await http.post(PATH, json=BACKGROUND, headers=headers)).json()
    await answer(worker)
    again = (await http.post(PATH, json=BACKGROUND, headers=headers)).json()
    assert again == (await read(http, first["id"])).json() and again["created_at"] == first["created_at"]
    stream = await http.post(PATH, json=BACKGROUND | {"stream": True}, headers=headers)
    assert events_in(stream.text)[-1]["response"] == again
