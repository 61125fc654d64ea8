"""Chat and text completions over HTTP, with a worker that the test drives."""

import asyncio
import json
import re

import httpx2
import pytest

from ingine.contract.events import TokensEvent, encode_event
from ingine.contract.keys import EVENT_FIELD, log_id
from ingine.contract.record import JobStatus
from ingine.gateway.keys import create_key
from ingine.producer import AsyncClient
from tests.gateway.serving import serving
from tests.gateway.test_errors import assert_error
from tests.waiting import wait_until_async

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
ASKED = {"model": "tiny", "messages": [{"role": "user", "content": "hi"}]}
USAGE = {"num_prompt_tokens": 5, "num_cached_tokens": 4, "num_output_tokens": 2}
OPENAI_USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 2,
    "total_tokens": 7,
    "prompt_tokens_details": {"cached_tokens": 4},
}


def chunks_in(text: str) -> list[dict]:
    """The chunks of a stream that ends as it should."""
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [json.loads(re.search("^data: (.*)$", event, re.MULTILINE)[1]) for event in events]


def rest_after(position: str, text: str) -> str:
    """What follows the event with that id."""
    return text.partition(f"id: {position}\n")[2].partition("\n\n")[2]


def without_time(text: str) -> str:
    """The text without the time of the job: of a resumed stream it is that of the server's clock."""
    return re.sub('"created":[0-9]+', '"created":0', text)


async def answer(worker, num_tokens: int = 2, **fields):
    """Run the next job. Returns it."""
    job = await worker.take()
    await worker.run(job.id, num_tokens, usage=USAGE, metadata=job.metadata, **fields)
    return job


async def post(http, path: str, body: dict, worker, **options) -> tuple[httpx2.Response, object]:
    """Post a request that the worker answers. Returns the response and the job."""
    response, job = await asyncio.gather(http.post(path, json=body), answer(worker, **options))
    return response, job


async def test_a_chat_completion(http, worker):
    response, job = await post(http, CHAT, ASKED | {"max_completion_tokens": 2, "seed": 7}, worker)
    assert response.status_code == 200
    body = response.json()
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "id": job.id,
        "object": "chat.completion",
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "finish_reason": "length",
                "message": {"role": "assistant", "content": "<1><2>", "refusal": None},
                "logprobs": None,
            }
        ],
        "usage": OPENAI_USAGE,
    }
    assert re.fullmatch("chatcmpl-[0-9a-f]{32}", job.id)
    assert response.headers["x-request-id"] == response.headers["openai-request-id"] == job.id
    assert (job.sampling.max_tokens, job.sampling.seed, job.model) == (2, 7, "tiny")
    assert job.messages[0].text == "hi" and job.deadline_ms == 600_000 and not job.stream


async def test_a_text_completion(http, worker):
    asked = {"model": "tiny", "prompt": "Once", "echo": True}
    response, job = await post(http, COMPLETION, asked, worker)
    body = response.json()
    assert (body["id"], body["object"]) == (job.id, "text_completion") and job.id.startswith("cmpl-")
    assert body["choices"] == [
        {"index": 0, "finish_reason": "length", "text": "Once<1><2>", "logprobs": None}
    ]


async def test_a_chat_stream_byte_by_byte(http, worker):
    response, job = await post(http, CHAT, ASKED | {"stream": True}, worker)
    created = chunks_in(response.text)[0]["created"]
    head = f'data: {{"id":"{job.id}","object":"chat.completion.chunk","created":{created},"model":"tiny",'
    head += '"choices":[{"index":0,"delta":'
    end = ',"logprobs":null,"finish_reason":null}]}\n\n'
    assert response.text == (
        f'{head}{{"role":"assistant","content":""}}{end}'
        f'id: {job.id}/1-0\n{head}{{"content":"<1>"}}{end}'
        f'id: {job.id}/2-0\n{head}{{"content":"<2>"}}{end}'
        f'id: {job.id}/2-1\n{head}{{}},"logprobs":null,"finish_reason":"length"}}]}}\n\n'
        "data: [DONE]\n\n"
    )
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["x-request-id"] == job.id and job.stream


async def test_a_text_stream(http, worker):
    asked = {"model": "tiny", "prompt": "Once", "echo": True, "stream": True}
    response, _ = await post(
        http, COMPLETION, asked, worker, finish_reason="stop", stop_reason="\n", text="!"
    )
    choices = [chunk["choices"][0] for chunk in chunks_in(response.text)]
    assert [choice["text"] for choice in choices] == ["Once", "<1>", "<2>", "!", ""]
    assert [choice["finish_reason"] for choice in choices] == [None, None, None, None, "stop"]
    assert choices[-1]["stop_reason"] == "\n"


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}])
async def test_usage_is_not_sent_unasked(http, worker, options):
    response, _ = await post(http, CHAT, ASKED | {"stream": True, "stream_options": options}, worker)
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks_in(response.text))


async def test_usage_comes_in_a_last_chunk_without_choices(http, worker):
    asked = ASKED | {"stream": True, "stream_options": {"include_usage": True}}
    response, job = await post(http, CHAT, asked, worker)
    *others, last = chunks_in(response.text)
    assert (last["choices"], last["usage"]) == ([], OPENAI_USAGE)
    assert all(chunk["usage"] is None for chunk in others)
    assert response.text.count(f"id: {job.id}/2-1\n") == 1


async def commit(worker, job_id: str, event: TokensEvent) -> None:
    raw = encode_event(event)
    async with worker.redis.pipeline(transaction=True) as step:
        step.xadd(worker.keys.tokens(job_id), {EVENT_FIELD: raw}, id=log_id(event.position))
        step.hset(worker.keys.job(job_id), "position", event.position)
        await step.execute()
    await worker.publish(job_id, raw)


async def run_two_choices(worker) -> str:
    """Answer a job of two choices. The second ends first; of the first, text is held back until the end."""
    job = await worker.take()
    await commit(worker, job.id, TokensEvent(1, [1], "a", index=0, choice_position=1))
    last = TokensEvent(3, [5, 6], "xy", index=1, choice_position=2, finish_reason="stop", stop_reason=6)
    await commit(worker, job.id, last)
    await commit(worker, job.id, TokensEvent(4, [2], "b", index=0, choice_position=2))
    ends = [
        {"index": 0, "finish_reason": "length", "num_output_tokens": 2, "text": "c"},
        {"index": 1, "finish_reason": "stop", "num_output_tokens": 2, "stop_reason": 6},
    ]
    await worker.end(job.id, 4, finish_reason="length", choices=ends, usage=USAGE)
    return job.id


async def test_several_choices(http, worker):
    asked = ASKED | {"n": 2, "stream": True}
    response, job_id = await asyncio.gather(http.post(CHAT, json=asked), run_two_choices(worker))
    choices = [choice for chunk in chunks_in(response.text) for choice in chunk["choices"]]
    for index, text, reason in ((0, "abc", "length"), (1, "xy", "stop")):
        own = [choice for choice in choices if choice["index"] == index]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in own) == text
        assert [choice["finish_reason"] for choice in own if choice["finish_reason"]] == [reason]
        assert own[-1]["finish_reason"] == reason
    position = f"{job_id}/1-0"
    again = await http.post(CHAT, json=asked, headers={"last-event-id": position})
    assert without_time(again.text) == without_time(rest_after(position, response.text))


@pytest.mark.parametrize(("path", "asked"), [(CHAT, ASKED), (COMPLETION, {"model": "tiny", "prompt": "a"})])
async def test_log_probabilities_of_a_stream(http, worker, path, asked):
    async def run() -> None:
        job = await worker.take()
        of_token = {"token_id": 7, "logprob": -0.5, "rank": 1, "top": [[7, -0.5]], "bytes": [195]}
        of_token["top_bytes"] = [[195]]
        of_prompt = [None, of_token]
        await commit(worker, job.id, TokensEvent(1, [7], "", logprobs=[of_token], prompt_logprobs=of_prompt))
        await commit(worker, job.id, TokensEvent(2, [8], "é", logprobs=[of_token]))
        await worker.end(job.id, 2)

    fields = {"logprobs": True, "top_logprobs": 1} if path == CHAT else {"logprobs": 1}
    response, _ = await asyncio.gather(
        http.post(path, json=asked | fields | {"prompt_logprobs": 1, "stream": True}), run()
    )
    chunks = chunks_in(response.text)
    assert [len(chunk["prompt_logprobs"]) for chunk in chunks if "prompt_logprobs" in chunk] == [2]
    logprobs = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk["choices"][0]["logprobs"]]
    assert len(logprobs) == 2
    if path == CHAT:
        (of_token,) = logprobs[0]["content"]
        assert (of_token["bytes"], of_token["top_logprobs"][0]["logprob"]) == ([195], -0.5)
    else:
        assert [each["text_offset"] for each in logprobs] == [[0], [1]]


async def test_tool_calls_and_reasoning(http, worker):
    called = {"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}

    async def run() -> None:
        job = await worker.take()
        deltas = [{"reasoning": "hm"}, {}, {"tool_calls": [called]}]
        deltas.append({"tool_calls": [{"index": 0, "function": {"arguments": "{}"}, "new": b"no JSON"}]})
        for number, delta in enumerate(deltas, 1):
            await commit(worker, job.id, TokensEvent(number, [number], "?", delta=delta))
        whole = {"role": "assistant", "content": None, "reasoning": "hm"}
        whole["tool_calls"] = [called | {"function": {"name": "f", "arguments": "{}"}}]
        await worker.end(job.id, 4, finish_reason="tool_calls", message=whole)

    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    response, _ = await asyncio.gather(http.post(CHAT, json=ASKED | {"tools": tools, "stream": True}), run())
    choices = [chunk["choices"][0] for chunk in chunks_in(response.text)]
    assert [choice["delta"] for choice in choices] == [
        {"role": "assistant", "content": ""},
        {"reasoning": "hm", "reasoning_content": "hm"},
        {"tool_calls": [called]},
        {"tool_calls": [{"index": 0, "function": {"arguments": "{}"}}]},
        {},
    ]
    assert choices[-1]["finish_reason"] == "tool_calls"


async def test_a_job_without_output_still_begins_and_ends(http, worker):
    response, _ = await post(http, CHAT, ASKED | {"stream": True}, worker, num_tokens=0, finish_reason="stop")
    choices = [chunk["choices"][0] for chunk in chunks_in(response.text)]
    assert [choice["delta"] for choice in choices] == [{"role": "assistant", "content": ""}, {}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("code", "status", "shown"),
    [("prompt_too_long", 400, "context_length_exceeded"), ("unknown_model", 404, "model_not_found")],
)
async def test_a_job_that_fails_at_once_has_a_status(http, worker, stream, code, status, shown):
    error = {"code": code, "message": "why"}
    response, job = await post(
        http, CHAT, ASKED | {"stream": stream}, worker, num_tokens=0, status=JobStatus.FAILED, error=error
    )
    assert "why" in assert_error(response, status, shown)["message"]
    assert response.headers["x-request-id"] == job.id


async def test_a_failure_in_mid_stream_does_not_look_like_an_end(http, worker):
    text = ""
    with pytest.raises(httpx2.RemoteProtocolError):
        async with http.stream("POST", CHAT, json=ASKED | {"stream": True}) as response, asyncio.timeout(60):
            serving = asyncio.ensure_future(
                answer(worker, status=JobStatus.FAILED, error={"code": "engine_error", "message": "why"})
            )
            async for part in response.aiter_text():
                text += part
    await serving
    assert "[DONE]" not in text and '"finish_reason":"' not in text
    assert json.loads(text.rpartition("data: ")[2])["error"]["code"] == "engine_error"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_job(http, worker, redis, keys, stream):
    asking = asyncio.ensure_future(http.post(CHAT, json=ASKED | {"stream": stream}))
    job = await worker.take()
    await worker.commit(job.id, 0, 1)
    asking.cancel()
    await wait_until_async(lambda: redis.hget(keys.job(job.id), "cancel"))
    assert await redis.hget(keys.job(job.id), "cancel") == b"1"


async def test_a_job_that_its_client_can_find_again_goes_on_without_it(http, worker, redis, keys):
    asked, headers = ASKED | {"stream": True}, {"idempotency-key": "order-1"}
    async with http.stream("POST", CHAT, json=asked, headers=headers) as response:
        job = await worker.take()
        await worker.commit(job.id, 0, 1)
        first = await anext(response.aiter_text())
    await worker.run_from(job.id, 1, 3)
    assert await redis.hget(keys.job(job.id), "cancel") in (None, b"0")
    again = await http.post(CHAT, json=asked, headers=headers)
    assert without_time(again.text).startswith(without_time(first)) and len(chunks_in(again.text)) == 5
    rest = await http.post(CHAT, json=asked, headers=headers | {"last-event-id": f"{job.id}/1-0"})
    assert len(chunks_in(rest.text)) == 3


async def test_a_client_that_leaves_before_its_job_begins(http, worker, settings, queue):
    asking = asyncio.ensure_future(http.post(CHAT, json=ASKED | {"stream": True}))
    async with AsyncClient(settings.redis_url, queue=queue) as client:
        (job,) = await wait_until_async(client.jobs)
        asking.cancel()
        await wait_until_async(lambda: is_cancelled(client, job.job_id))


async def is_cancelled(client: AsyncClient, job_id: str) -> bool:
    return (await client.status(job_id)).status is JobStatus.CANCELLED


async def test_a_stream_is_resumed_after_any_event(http, worker):
    asked = ASKED | {"stream": True, "stream_options": {"include_usage": True}}
    response, job = await post(http, CHAT, asked, worker, num_tokens=3)
    ids = re.findall("^id: (.*)$", response.text, re.MULTILINE)
    assert ids == [f"{job.id}/{position}" for position in ("1-0", "2-0", "3-0", "3-1")]
    for position in ids:
        again = await http.post(CHAT, json=asked, headers={"last-event-id": position})
        assert without_time(again.text) == without_time(rest_after(position, response.text))
        assert again.headers["x-request-id"] == job.id


async def test_another_gateway_can_resume_a_stream(http, worker, settings):
    async with http.stream("POST", CHAT, json=ASKED | {"stream": True}) as response:
        job = await worker.take()
        await worker.commit(job.id, 0, 1)
        await anext(response.aiter_text())
    await worker.run_from(job.id, 1, 3)
    async with serving(settings) as other:
        headers = {"last-event-id": f"{job.id}/1-0"}
        rest = await other.post(CHAT, json=ASKED | {"stream": True}, headers=headers)
    assert [c["choices"][0]["delta"].get("content") for c in chunks_in(rest.text)] == ["<2>", "<3>", None]


async def test_a_stranger_cannot_resume_a_stream(worker, settings, tmp_path):
    path = tmp_path / "keys.json"
    own, same, other = (create_key(path, tenant=tenant, models=None)[1] for tenant in ("a", "a", "b"))
    async with serving(settings.model_copy(update={"gateway_keys": path})) as http:
        asked = ASKED | {"stream": True}
        bearer = {"authorization": f"Bearer {own}"}
        _, job = await asyncio.gather(http.post(CHAT, json=asked, headers=bearer), answer(worker))
        assert job.tenant == "a"
        for key, status in ((own, 200), (same, 200), (other, 404)):
            headers = {"authorization": f"Bearer {key}", "last-event-id": f"{job.id}/1-0"}
            response = await http.post(CHAT, json=asked, headers=headers)
            assert response.status_code == status
        headers["last-event-id"] = job.id.replace("chatcmpl", "cmpl") + "/1-0"
        assert_error(await http.post(CHAT, json=asked, headers=headers), 404, "not_found")
        headers["last-event-id"] = "7"
        assert_error(await http.post(CHAT, json=asked, headers=headers), 400, "invalid_last_event_id")


async def test_the_same_idempotency_key_finds_the_same_job(http, worker):
    headers = {"idempotency-key": "order-1"}
    first, job = await asyncio.gather(http.post(CHAT, json=ASKED, headers=headers), answer(worker))
    again = await http.post(CHAT, json=ASKED, headers=headers)
    assert first.json()["id"] == again.json()["id"] == job.id
    assert again.json()["choices"] == first.json()["choices"]


async def test_a_key_may_ask_for_its_models_only(worker, settings, tmp_path):
    path = tmp_path / "keys.json"
    _, key = create_key(path, tenant=None, models=["other"])
    async with serving(settings.model_copy(update={"gateway_keys": path})) as http:
        response = await http.post(CHAT, json=ASKED, headers={"authorization": f"Bearer {key}"})
        assert assert_error(response, 403, "model_not_allowed")["param"] == "model"


async def test_a_full_queue_and_a_rate_say_when_to_try_again(http, worker, settings, queue):
    async with AsyncClient(settings.redis_url, queue=queue) as client:
        await client.set_limits(max_jobs=1)
        handle = await client.submit("hi")
        response = await http.post(CHAT, json=ASKED)
        error = assert_error(response, 429, "queue_full")
        assert error["type"] == "rate_limit_error" and response.headers["retry-after-ms"] == "2000"
        await client.set_limits(max_jobs=100, max_jobs_per_s=1e-3)
        await handle.cancel()
        await client.submit("hi")
        response = await http.post(CHAT, json=ASKED)
        assert_error(response, 429, "rate_limit_exceeded")
        assert int(response.headers["retry-after-ms"]) > 1000 and int(response.headers["retry-after"]) > 1


async def test_without_a_worker_nothing_is_accepted(http, settings, queue):
    response = await http.post(CHAT, json=ASKED)
    assert_error(response, 503, "no_worker")
    assert response.headers["retry-after"] == "5"
    async with AsyncClient(settings.redis_url, queue=queue) as client:
        assert await client.jobs() == []


async def test_pings_while_a_job_waits(settings, worker):
    quick = settings.model_copy(update={"gateway_ping_s": 0.05})
    text = ""
    async with serving(quick) as http, http.stream("POST", CHAT, json=ASKED | {"stream": True}) as response:
        job = None
        async for part in response.aiter_text():
            text += part
            if job is None and text.count(": ping\n") >= 2:
                job = await answer(worker)
    assert text.startswith(": ping\n: ping\n") and ": ping\n\n" not in text
    assert len(chunks_in(text)) == 4
