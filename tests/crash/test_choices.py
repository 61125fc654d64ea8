"""`kill -9` at every commit of jobs with several choices, grammars, stop strings and log probabilities."""

import asyncio
from collections.abc import AsyncIterator
from itertools import count, product

import pytest
import pytest_asyncio

from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.worker.hosting.engine_thread import MAX_STEPS_AHEAD
from tests.chaos.zygote import Zygote
from tests.crash import killing
from tests.crash.killing import Killing, assert_uninterrupted
from tests.servers import durable_server
from tests.waiting import HANGS_S

pytestmark = pytest.mark.asyncio(loop_scope="module")

PROMPT = "Once upon a time, "
STEP_S = 0.03
"""Additional time of a step, so that mostly no step waits. Up to MAX_STEPS_AHEAD steps that wait for the
server are one commit."""
NUM_ROUNDS_AT_ONCE = 3
"""A round waits for a lease for most of its time."""
SCHEMA = {
    "type": "array", "items": {"enum": ["x", "yes", 1]}, "minItems": 1, "maxItems": 2,
    "x-guidance": {"whitespace_flexible": False},
}  # fmt: skip
REGEX = "[a-f]{2,4}(-[0-9]{2}){1,2}[g-k]*!"
SAMPLINGS = {
    "greedy": {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "n": 4},
    "sampled": {"temperature": 1.5, "seed": 5, "max_tokens": 6, "ignore_eos": True, "n": 4},
    "uneven": {"temperature": 1.5, "seed": 4, "max_tokens": 6, "stop_token_ids": list(range(60)), "n": 4},
    "json": {
        "temperature": 3.0, "seed": 76, "max_tokens": 12, "n": 4, "structured_outputs": {"json": SCHEMA},
    },
    "regex": {
        "temperature": 0, "max_tokens": 12, "structured_outputs": {"regex": REGEX}, "logprobs": 2,
        "prompt_logprobs": 1, "stop": ["kk", "-9"], "include_stop_str_in_output": True, "bad_words": ["a"],
    },
}  # fmt: skip
CONSTRAINED = [name for name, sampling in SAMPLINGS.items() if "structured_outputs" in sampling]


@pytest.fixture(scope="module")
def engine(tiny_model) -> Engine:
    return Engine(EngineConfig(model=str(tiny_model), dtype="float32", device="cpu"))


@pytest.fixture(scope="module")
def uninterrupted(engine) -> dict[str, killing.Uninterrupted]:
    return {name: killing.uninterrupted(engine, PROMPT, sampling) for name, sampling in SAMPLINGS.items()}


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def kills(tmp_path_factory, tiny_model) -> AsyncIterator[Killing]:
    folder, ended = tmp_path_factory.mktemp("kills"), {}
    zygote = await Zygote(folder, ended.__setitem__).start()
    with durable_server(folder / "valkey") as server:
        yield Killing(zygote, ended, server.url, tiny_model)
    await zygote.stop()


async def one_round(kills: Killing, name: str, number: int, when: str, expected) -> bool:
    """Kill a worker at a commit, and let another one end the job. Returns whether the first one died."""
    queue = f"{name}-{number}-{when}"
    async with kills.client(queue) as client:
        job = await client.submit(PROMPT, sampling=SAMPLINGS[name])
        live, parts = (asyncio.create_task(each(job)) for each in (killing.stream, killing.stream_in_parts))
        fate = {"crash": ("append", number, when), "step_s": STEP_S}
        victim = await kills.worker(queue, "victim", fate=fate, async_scheduling=True)
        died = await kills.ended_first(victim, job)  # the job may have fewer commits
        heir = await kills.worker(queue, "heir", fate={})
        early = {"live": await live, "in parts": await parts}
        received = await killing.received(job, early, HANGS_S)
    kills.end(victim, heir)
    assert_uninterrupted(received, expected, f"killed {when} commit {number}")
    await kills.check_log(queue, job.job_id)
    return died


@pytest.mark.parametrize("name", SAMPLINGS)
async def test_kill_9_at_every_commit(kills, uninterrupted, name):
    expected = uninterrupted[name]
    slots = asyncio.Semaphore(NUM_ROUNDS_AT_ONCE)

    async def in_turn(number: int, when: str) -> bool:
        async with slots:
            return await one_round(kills, name, number, when, expected)

    # A step has one token of each choice, except the first one, which computes the prompt for choice 0.
    rounds = list(product(range(1, expected.num_tokens + 2), ("amid", "after")))
    if name in CONSTRAINED:  # each round starts processes that compile grammars
        rounds = [(number, when) for number, when in rounds if (number % 2 == 0) == (when == "amid")]
    died = await asyncio.gather(*(in_turn(*each) for each in rounds))
    assert sum(died) >= len(rounds) // MAX_STEPS_AHEAD


async def test_kill_9_after_every_token_of_one_job(kills, uninterrupted):
    await asyncio.gather(
        *(killed_after_every_token(kills, name, uninterrupted[name]) for name in CONSTRAINED)
    )


async def killed_after_every_token(kills: Killing, name: str, expected: killing.Uninterrupted) -> None:
    """Each worker goes on with what all before it have committed, and dies at its own first commit."""
    queue = f"{name}-again"
    async with kills.client(queue) as client:
        job = await client.submit(PROMPT, sampling=SAMPLINGS[name])
        live, parts = (asyncio.create_task(each(job)) for each in (killing.stream, killing.stream_in_parts))
        for number in count(1):
            fate = {"crash": ("append", 1, "amid" if number % 3 == 0 else "after"), "step_s": STEP_S}
            worker = await kills.worker(
                queue, f"worker-{number}", fate=fate, async_scheduling=True, max_deaths=1000
            )
            if not await kills.ended_first(worker, job):
                break
        early = {"live": await live, "in parts": await parts}
        received = await killing.received(job, early, HANGS_S)
        info = await job.status()
    kills.end(worker)
    assert_uninterrupted(received, expected, f"killed {number} times")
    await kills.check_log(queue, job.job_id)
    # Only the first worker may have committed several steps at once.
    assert info.deaths >= expected.num_tokens - MAX_STEPS_AHEAD
