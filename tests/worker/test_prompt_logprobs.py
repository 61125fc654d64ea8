"""Log probabilities of a prompt are in its log's first event, also if a worker dies before or after it."""

import pytest

from ingine.contract.events import TokensEvent
from ingine.contract.jobs import Job
from ingine.sampling_params import SamplingParams
from tests.worker.test_worker import leave_behind

PROMPT = "a prompt"
JOB = Job(
    id="a",
    prompt=PROMPT,
    sampling=SamplingParams(temperature=0, max_tokens=5, ignore_eos=True, prompt_logprobs=1),
)


async def test_they_are_in_the_first_event(harness):
    here = await harness()
    await here.push(JOB)
    first, *others, _ = await here.events("a")
    assert [entry and entry["decoded_token"] for entry in first.prompt_logprobs] == [None, *PROMPT[1:]]
    assert all(event.prompt_logprobs is None for event in others)


@pytest.mark.parametrize("position", [0, 1])
async def test_after_a_death_they_are_there_once(harness, position):
    here = await harness()
    await here.push(JOB.model_copy(update={"id": "whole"}))
    *whole, _ = await here.events("whole")
    token_ids = [token_id for event in whole for token_id in event.token_ids]
    left = [TokensEvent(1, token_ids[:1], "", prompt_logprobs=whole[0].prompt_logprobs)][:position]
    await leave_behind(here, JOB, left)
    *events, _ = await here.events("a")
    assert [token_id for event in events for token_id in event.token_ids] == token_ids
    assert [event.prompt_logprobs for event in events if event.prompt_logprobs] == [whole[0].prompt_logprobs]


CHOICES = JOB.model_copy(update={"sampling": JOB.sampling.model_copy(update={"n": 3})})


async def test_several_choices_have_them_once(harness):
    """In the first event of choice 0."""
    here = await harness()
    await here.push(JOB)
    await here.push(CHOICES.model_copy(update={"id": "b"}))
    expected = (await here.events("a"))[0].prompt_logprobs
    *events, end = await here.events("b")
    with_them = [event for event in events if event.prompt_logprobs is not None]
    assert [(event.index, event.prompt_logprobs) for event in with_them] == [(0, expected)]
    assert with_them[0].choice_position == len(with_them[0].token_ids)
    assert len(end.choices) == 3


@pytest.mark.parametrize("first", [0, 1])
async def test_after_a_death_choices_have_them_once(harness, first):
    """first: the choice that the log already has a token of."""
    here = await harness()
    await here.push(JOB.model_copy(update={"id": "whole"}))
    whole, *_ = await here.events("whole")
    left = TokensEvent(1, whole.token_ids[:1], "", index=first, choice_position=1)
    if first == 0:
        left.prompt_logprobs = whole.prompt_logprobs
    await leave_behind(here, CHOICES, [left])
    *events, _ = await here.events("a")
    reports = [(e.index, e.prompt_logprobs) for e in events if e.prompt_logprobs is not None]
    assert reports == [(0, whole.prompt_logprobs)]
