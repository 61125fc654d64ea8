"""`kill -9` at every commit of jobs of each kind: of several choices, with grammars, with tool calls."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from functools import cache
from itertools import count, product
from pathlib import Path

import pytest
import pytest_asyncio

from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.errors import JobCancelled, JobExpired
from ingine.worker.hosting.engine_thread import MAX_STEPS_AHEAD
from tests.chaos.outputs import Output as ChoiceOutput
from tests.chaos.outputs import faults_of_choices, outputs_of
from tests.chaos.zygote import Zygote
from tests.crash import killing
from tests.crash.killing import Killing, Uninterrupted, assert_uninterrupted
from tests.servers import durable_server
from tests.tiny_models import VOCAB_SIZE, add_tokens, make_tiny_model
from tests.waiting import HANGS_S, wait_until_async

pytestmark = pytest.mark.asyncio(loop_scope="module")

STEP_S = 0.03
"""Additional time of a step, so that mostly no step waits. Up to MAX_STEPS_AHEAD steps that wait for the
server are one commit."""
NUM_ROUNDS_AT_ONCE = 3
"""A round waits for a lease for most of its time."""

PIECES = ["<tool_call>", "</tool_call>", '{"name": "', '", "arguments": {"a": ', "}}"]
"""Tokens of the model beside bytes, so that a tool call has few of them."""
TAGS = ["<think>", "</think>"]
"""Special tokens of the model: they are in its messages, and not in its text."""
PIECE_IDS = range(VOCAB_SIZE, VOCAB_SIZE + len(PIECES))
TAG_IDS = range(PIECE_IDS.stop, PIECE_IDS.stop + len(TAGS))

SCHEMA = {
    "type": "array", "items": {"enum": ["x", "yes", 1]}, "minItems": 1, "maxItems": 2,
    "x-guidance": {"whitespace_flexible": False},
}  # fmt: skip
REGEX = "[a-f]{2,4}(-[0-9]{2}){1,2}[g-k]*!"
CALLS = "\n".join(
    (
        "start: /[a-c]{0,2}/ call call?",
        f"call: <[{PIECE_IDS[0]}]> {json.dumps(PIECES[2])} /[fg]/ {json.dumps(PIECES[3])} /[0-9]{{1,2}}/ "
        f"{json.dumps(PIECES[4])} <[{PIECE_IDS[1]}]>",
    )
)
SAMPLINGS = {
    "greedy": {"temperature": 0, "max_tokens": 6, "ignore_eos": True, "n": 4},
    "sampled": {"temperature": 1.5, "seed": 5, "max_tokens": 6, "ignore_eos": True, "n": 4},
    "uneven": {"temperature": 1.5, "seed": 4, "max_tokens": 6, "stop_token_ids": list(range(60)), "n": 4},
    "json": {
        "temperature": 3.0, "seed": 76, "max_tokens": 12, "n": 4, "structured_outputs": {"json": SCHEMA},
    },
    "regex": {
        "temperature": 0, "max_tokens": 12, "structured_outputs": {"regex": REGEX}, "logprobs": 2,
        "prompt_logprobs": 1, "stop": ["ik", "-9"], "include_stop_str_in_output": True, "bad_words": ["a"],
    },
    "calls": {
        "temperature": 1.0, "seed": 10, "max_tokens": 30, "n": 2, "structured_outputs": {"grammar": CALLS},
        "logit_bias": dict.fromkeys(PIECE_IDS, 3.0),
    },
    "reasoning": {
        "temperature": 2.0, "seed": 0, "max_tokens": 8, "n": 3, "allowed_token_ids": [64, 65, *TAG_IDS],
        "logit_bias": dict.fromkeys(TAG_IDS, 3.0),
    },
}  # fmt: skip
CONSTRAINED = [name for name, sampling in SAMPLINGS.items() if "structured_outputs" in sampling]
CHATS = ("calls", "reasoning")
PROMPT = {"prompt": "Once upon a time, "}
CHAT = {"messages": [{"role": "user", "content": "Hi"}], "tools": killing.TOOLS}
JOBS = {
    name: {"sampling": sampling} | (CHAT if name in CHATS else PROMPT) for name, sampling in SAMPLINGS.items()
}


def make_model(folder: Path) -> Path:
    model = make_tiny_model(folder, num_layers=4, vocab_size=TAG_IDS.stop)
    add_tokens(model, PIECES, TAGS)
    return model


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def uninterrupted_in(model) -> Callable[[str], dict[str, Uninterrupted]]:
    """What the jobs generate in a number format."""

    @cache
    def generate(dtype: str) -> dict[str, Uninterrupted]:
        engine = Engine(EngineConfig(model=str(model), dtype=dtype, device="cpu"))
        return {name: killing.uninterrupted(engine, job) for name, job in JOBS.items()}

    return generate


@pytest.fixture(scope="module")
def uninterrupted(uninterrupted_in) -> dict[str, Uninterrupted]:
    return uninterrupted_in("float32")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def kills(tmp_path_factory, model) -> AsyncIterator[Killing]:
    folder, ended = tmp_path_factory.mktemp("kills"), {}
    zygote = await Zygote(folder, ended.__setitem__).start()
    with durable_server(folder / "valkey") as server:
        yield Killing(zygote, ended, server.url, model)
    await zygote.stop()


async def test_the_jobs_are_what_they_are_to_be(uninterrupted):
    texts = {name: [each.text for each in of.outputs.values()] for name, of in uninterrupted.items()}
    lengths = {len(output.token_ids) for output in uninterrupted["uneven"].outputs.values()}
    assert len(lengths) > 1 and len(set(texts["json"])) == 4 and texts["regex"][0].endswith("jik")
    assert [text.count("</tool_call>") for text in texts["calls"]] == [2, 2]
    assert [text.startswith("<tool_call>") for text in texts["calls"]] == [False, True]
    marked = uninterrupted["reasoning"].marked_texts
    assert any(text.startswith("<think>") and "</think>" in text for text in marked)


async def one_round(
    kills: Killing, name: str, number: int, when: str, expected: Uninterrupted, dtype: str
) -> bool:
    """Kill a worker at a commit, and let another one end the job. Returns whether the first one died."""
    queue = f"{name}-{number}-{when}-{dtype}"
    async with kills.client(queue) as client:
        job = await client.submit(**JOBS[name])
        live, parts = (asyncio.create_task(each(job)) for each in (killing.stream, killing.stream_in_parts))
        fate = {"crash": ("append", number, when), "step_s": STEP_S}
        victim = await kills.worker(queue, "victim", fate=fate, dtype=dtype, async_scheduling=True)
        died = await kills.ended_first(victim, job)  # the job may have fewer commits
        heir = await kills.worker(queue, "heir", fate={}, dtype=dtype)
        early = {"live": await live, "in parts": await parts}
        received = await killing.received(job, early, HANGS_S)
    kills.end(victim, heir)
    what = f"killed {when} commit {number}"
    assert_uninterrupted(received, expected, is_chat=name in CHATS, what=what)
    assert (await kills.log(queue, job.job_id)).status == "finished"
    return died


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.wide)])
@pytest.mark.parametrize("name", JOBS)
async def test_kill_9_at_every_commit(kills, uninterrupted_in, name, dtype):
    expected = uninterrupted_in(dtype)[name]
    slots = asyncio.Semaphore(NUM_ROUNDS_AT_ONCE)

    async def in_turn(number: int, when: str) -> bool:
        async with slots:
            return await one_round(kills, name, number, when, expected, dtype)

    # A step has one token of each choice, except the first one, which computes the prompt for choice 0.
    rounds = list(product(range(1, expected.num_tokens + 2), ("amid", "after")))
    if name in (*CONSTRAINED, *CHATS):  # each round starts more processes, for grammars and chats
        rounds = [(number, when) for number, when in rounds if (number % 2 == 0) == (when == "amid")]
    died = await asyncio.gather(*(in_turn(*each) for each in rounds))
    assert sum(died) >= len(rounds) // MAX_STEPS_AHEAD


async def test_kill_9_after_every_token_of_one_job(kills, uninterrupted):
    names = (*CONSTRAINED, "reasoning")
    jobs = [killed_after_every_token(kills, name, uninterrupted[name]) for name in names]
    await asyncio.gather(*jobs)


async def killed_after_every_token(kills: Killing, name: str, expected: Uninterrupted) -> None:
    """Each worker goes on with what all before it have committed, and dies at its own first commit."""
    queue = f"{name}-again"
    async with kills.client(queue) as client:
        job = await client.submit(**JOBS[name])
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
    assert_uninterrupted(received, expected, is_chat=name in CHATS, what=f"killed {number} times")
    assert (await kills.log(queue, job.job_id)).status == "finished"
    # Only the first worker may have committed several steps at once.
    assert info.deaths >= expected.num_tokens - MAX_STEPS_AHEAD


@pytest.mark.parametrize("when", ["cancelled before", "cancelled meanwhile", "expired"])
async def test_a_job_that_ends_early_after_a_kill_has_beginnings(kills, uninterrupted, when):
    """Before: no worker runs the job. Meanwhile: the next worker has continued it."""
    name = "calls"
    queue, expected = when.replace(" ", "-"), uninterrupted[name]
    deadline_s = 3.0 if when == "expired" else None
    async with kills.client(queue) as client:
        job = await client.submit(**JOBS[name], deadline_s=deadline_s)
        fate = {"crash": ("append", 2, "after"), "step_s": STEP_S}
        victim = await kills.worker(queue, "victim", fate=fate, async_scheduling=True)
        await kills.ended_first(victim, job)
        if when == "cancelled before":
            await job.cancel()
        before = (await job.status()).position
        heir = await kills.worker(queue, "heir", fate={"step_s": 1.0}, async_scheduling=True)
        if when == "cancelled meanwhile":

            async def goes_on() -> bool:
                return (await job.status()).position > before

            await wait_until_async(goes_on, what="a token of the next worker")
            await job.cancel()
        with pytest.raises((JobCancelled, JobExpired)):
            await job.result(HANGS_S)
    kills.end(victim, heir)
    log = await kills.log(queue, job.job_id)
    assert log.status == when.split()[0]
    num_choices = len(expected.outputs)
    assert not list(faults_of_choices(log, num_choices))
    outputs = outputs_of(log)
    assert sum(len(output.token_ids) for output in outputs.values()) > 0
    for index, output in outputs.items():
        right = expected.outputs[index]
        assert output.begins(ChoiceOutput(right.token_ids, right.text))
