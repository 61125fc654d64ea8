"""A worker that speculates commits several tokens in an event, and its logs say the same as without."""

from dataclasses import replace

import pytest

from ingine.contract.jobs import Job
from ingine.engine.schedule.speculation import Speculator
from ingine.worker.metrics import Metrics
from tests.waiting import wait_until_async

PROMPT = "to be or not to be"

# The tokens of four letters are likelier than all others, so that the output repeats itself and guesses come
# true.
LETTERS = {65: "b", 66: "c", 67: "d", 68: "e"}
REPEATING = {"ignore_eos": True, "logit_bias": dict.fromkeys(LETTERS, 12.0)}
PAIRS = tuple(first + second for first in LETTERS.values() for second in LETTERS.values())
JOBS = {
    "greedy": {"temperature": 0},
    "random": {"temperature": 1.0, "seed": 1},
    "logprobs": {"temperature": 0, "logprobs": 1},
    "stop-string": {"temperature": 0, "stop": PAIRS, "min_tokens": 30},
}


@pytest.fixture
def drafting_at_any_cost(monkeypatch) -> None:
    """Draft always: the decision otherwise depends on measured times."""
    monkeypatch.setattr(Speculator, "_limits", lambda self, num_seqs: (0.05, 8))


async def logs(worker) -> dict[str, tuple]:
    """The log of each job: its tokens with their logprobs, its text, and its end."""
    for name, sampling in JOBS.items():
        await worker.push(Job(id=name, prompt=PROMPT, sampling={"max_tokens": 60} | REPEATING | sampling))
    found = {}
    for name in JOBS:
        *events, end = await worker.events(name)
        token_ids = [token_id for event in events for token_id in event.token_ids]
        logprobs = [entry["token_id"] for event in events for entry in event.logprobs or ()]
        text = "".join(event.text for event in events)
        found[name] = (token_ids, logprobs, text, end.text, end.finish_reason, end.position)
    return found


async def test_logs_are_the_same_and_have_fewer_events(harness, tiny_engine, drafting_at_any_cost):
    plain = await harness()
    expected = await logs(plain)
    assert expected["stop-string"][4] == "stop"
    await plain.stop()
    for name in JOBS:
        await plain.redis.delete(plain.keys.job(name), plain.keys.tokens(name))

    engine = tiny_engine(speculation="ngram")
    speculating = await harness(engine)
    assert await logs(speculating) == expected
    assert engine.stats().num_accepted_tokens > 0
    *events, _ = await speculating.events("greedy")
    assert len(events) < len(expected["greedy"][0])


async def test_a_job_is_drafted_from_its_own_tenant_s_outputs_alone(
    harness, tiny_engine, drafting_at_any_cost
):
    """Otherwise the time of a job would reveal the answers of another tenant's."""

    async def num_drafted_right(tenant: str | None) -> int:
        before = engine.stats().num_accepted_tokens
        name = f"{tenant}-{before}-{len(ended)}"
        sampling = {"temperature": 0, "max_tokens": 40, "ignore_eos": True}
        await here.push(Job(id=name, prompt=PROMPT, sampling=sampling, tenant=tenant))
        *events, _ = await here.events(name)
        ended.append([token_id for event in events for token_id in event.token_ids])
        return engine.stats().num_accepted_tokens - before

    ended: list[list[int]] = []
    engine = tiny_engine(speculation="suffix")
    here = await harness(engine)
    new = await num_drafted_right("a")
    assert await num_drafted_right("b") == await num_drafted_right(None) == new
    assert await num_drafted_right("a") > new
    assert await num_drafted_right(None) > new, "jobs without a tenant are one tenant's"
    assert all(output == ended[0] for output in ended)


def test_metrics_count_guesses_and_those_that_came_true(tiny_engine):
    metrics, stats = Metrics(), tiny_engine().stats()
    for num_draft_tokens, num_accepted_tokens in ((8, 5), (12, 6)):  # totals
        stats = replace(stats, num_draft_tokens=num_draft_tokens, num_accepted_tokens=num_accepted_tokens)
        metrics.observe_engine(stats, num_jobs=1)
    assert metrics.registry.get_sample_value("ingine_draft_tokens_total") == 12
    assert metrics.registry.get_sample_value("ingine_accepted_draft_tokens_total") == 6


async def test_a_job_that_was_handed_over_goes_on_without_speculation(
    harness, tiny_engine, drafting_at_any_cost
):
    async def has_begun() -> bool:
        return await first.position("moved") >= 30

    sampling = {"temperature": 0, "max_tokens": 400} | REPEATING
    first = await harness(tiny_engine(speculation="ngram"))
    await first.push(Job(id="moved", prompt=PROMPT, sampling=sampling))
    await wait_until_async(has_begun, what="some drafts")
    await first.stop()
    second = await harness()
    *events, end = await second.events("moved")
    assert end.position == 400 and end.timings["attempts"] == 2
    assert any(len(event.token_ids) > 1 for event in events)

    await second.push(Job(id="whole", prompt=PROMPT, sampling=sampling))
    *expected, _ = await second.events("whole")
    assert [t for event in events for t in event.token_ids] == [t for e in expected for t in e.token_ids]
