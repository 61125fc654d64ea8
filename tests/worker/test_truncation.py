"""`truncate_prompt_tokens`: the last tokens of a prompt, also if all of it would be too long."""

import pytest

from ingine.contract.chat import Message
from ingine.contract.events import TerminalEvent
from ingine.contract.jobs import Job
from ingine.contract.record import JobStatus
from ingine.errors import ErrorCode
from ingine.sampling_params import SamplingParams
from tests.worker.conftest import Harness

LENGTH = 64
"""The model's length in tokens. A token is a byte."""


def params(kept: int | None, **fields) -> SamplingParams:
    fields = {"temperature": 0.0, "max_tokens": 5, "ignore_eos": True} | fields
    return SamplingParams(**fields, truncate_prompt_tokens=kept)


@pytest.fixture
async def here(harness, tiny_engine) -> Harness:
    return await harness(tiny_engine(max_model_len=LENGTH))


async def run(here: Harness, job: Job) -> tuple[list[int], TerminalEvent]:
    await here.push(job)
    *tokens, end = await here.events(job.id)
    return [token_id for event in tokens for token_id in event.token_ids], end


LONG = "".join(chr(97 + i % 26) for i in range(5000))


@pytest.mark.parametrize("prompt", [LONG[:40], LONG[:200], LONG], ids=["short", "too long", "read beside"])
async def test_the_last_tokens_are_the_prompt(here, prompt):
    whole, end = await run(here, Job(id="cut", prompt=prompt, sampling=params(7)))
    assert (end.status, end.usage["num_prompt_tokens"]) == (JobStatus.FINISHED, 7)
    alone, _ = await run(here, Job(id="alone", prompt=prompt[-7:], sampling=params(None)))
    assert whole == alone


async def test_token_ids_and_conversations_are_cut_too(here):
    _, end = await run(here, Job(id="ids", prompt=tuple(range(60, 100)), sampling=params(7)))
    assert end.usage["num_prompt_tokens"] == 7
    message = Message(role="user", content=LONG)
    _, end = await run(here, Job(id="chat", messages=(message,), sampling=params(9)))
    assert (end.status, end.usage["num_prompt_tokens"]) == (JobStatus.FINISHED, 9)


@pytest.mark.parametrize(("max_tokens", "kept"), [(5, LENGTH - 5), (10**9, LENGTH - 1), (None, LENGTH - 1)])
async def test_minus_one_keeps_what_the_length_leaves(here, max_tokens, kept):
    _, end = await run(here, Job(id="a", prompt=LONG, sampling=params(-1, max_tokens=max_tokens)))
    assert (end.finish_reason, end.usage["num_prompt_tokens"]) == ("length", kept)


async def test_what_is_kept_must_fit(here):
    for prompt in (LONG, LONG[:100]):
        _, end = await run(here, Job(id=f"a{len(prompt)}", prompt=prompt, sampling=params(LENGTH)))
        assert end.error["code"] == ErrorCode.PROMPT_TOO_LONG
    _, end = await run(here, Job(id="fits", prompt="abc", sampling=params(10**6)))
    assert end.usage["num_prompt_tokens"] == 3


async def test_what_minus_one_keeps_does_not_depend_on_a_worker_s_memory(harness, tiny_engine):
    """A job that goes on elsewhere must have the same prompt there, or none."""
    small = tiny_engine(max_model_len=LENGTH, kv_cache_bytes=3 * 8192)  # 48 tokens
    assert small.limits.max_num_tokens < LENGTH
    here = await harness(small)
    _, end = await run(here, Job(id="a", prompt=LONG, sampling=params(-1)))
    assert end.error["code"] == ErrorCode.PROMPT_TOO_LONG
