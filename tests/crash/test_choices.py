"""`kill -9` at every commit of jobs with several choices: each choice goes on as if nothing had happened."""

import signal
from collections.abc import AsyncIterator
from functools import partial
from itertools import product

import pytest
import redis.asyncio

from ingine.contract.events import decode_log
from ingine.contract.keys import Keys
from ingine.contract.record import JobStatus
from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.request import EngineRequest
from ingine.producer import AsyncClient
from ingine.sampling_params import SamplingParams
from ingine.worker.hosting.engine_thread import MAX_STEPS_AHEAD
from tests.chaos.zygote import Zygote
from tests.waiting import HANGS_S, wait_until_async

PROMPT = "Once upon a time, "
N, NUM_TOKENS = 4, 6
MAX_COMMITS = NUM_TOKENS + 1
"""A step has one token of each choice, except the first one, which computes the prompt for choice 0. Up to
MAX_STEPS_AHEAD steps that wait for the server are one commit."""
STEP_S = 0.03
"""Additional time of a step, so that mostly no step waits."""
SAMPLINGS = {
    "greedy": {"temperature": 0, "max_tokens": NUM_TOKENS, "ignore_eos": True, "n": N},
    "sampled": {"temperature": 1.5, "seed": 5, "max_tokens": NUM_TOKENS, "ignore_eos": True, "n": N},
    "uneven": {
        "temperature": 1.5, "seed": 4, "max_tokens": NUM_TOKENS, "stop_token_ids": list(range(60)), "n": N,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def uninterrupted(tiny_model) -> dict[str, list[tuple[list[int], str, str]]]:
    """Token ids, text and finish reason of each choice, from lone requests to the engine."""
    engine = Engine(EngineConfig(model=str(tiny_model), dtype="float32", device="cpu"))
    prompt = engine.tokenizer.encode(PROMPT)
    found = {}
    for name, sampling in SAMPLINGS.items():
        found[name] = []
        for index in range(N):
            params = SamplingParams(**sampling | {"n": 1, "seed": sampling.get("seed", 0) + index})
            engine.add(EngineRequest("one", prompt, params))
            token_ids, text = [], ""
            while engine.has_unfinished:
                for output in engine.step():
                    token_ids += output.token_ids
                    text += output.text + output.final_text
            found[name].append((token_ids, text, str(output.finish_reason)))
    return found


@pytest.fixture
async def zygote(tmp_path) -> AsyncIterator[tuple[Zygote, dict[str, int]]]:
    ended: dict[str, int] = {}
    zygote = await Zygote(tmp_path, ended.__setitem__).start()
    yield zygote, ended
    await zygote.stop()


async def is_over(
    connection: redis.asyncio.Redis, keys: Keys, job_id: str, process: str, ended: dict[str, int]
) -> bool:
    """Whether a process or its job has ended."""
    if process in ended:
        return True
    status = await connection.hget(keys.job(job_id), "status")
    return status is not None and JobStatus(status.decode()).terminal


@pytest.mark.parametrize("name", SAMPLINGS)
async def test_kill_9_at_every_commit(zygote, server, tiny_model, uninterrupted, name):
    forked, ended = zygote
    num_killed = 0
    connection = redis.asyncio.Redis.from_url(server.url)
    for number, when in product(range(1, MAX_COMMITS + 1), ("amid", "after")):
        queue = f"{name}-{number}-{when}"
        keys = Keys(queue)
        settings = {
            "queue": queue, "redis_url": server.url, "model": str(tiny_model), "dtype": "float32",
            "device": "cpu", "http_port": -1, "lease_s": 0.5, "max_num_seqs": 8,
        }  # fmt: skip
        async with AsyncClient(server.url, queue=queue) as client:
            job = await client.submit(PROMPT, sampling=SAMPLINGS[name])
            victim = f"{queue}-victim"
            await forked.spawn(
                victim,
                "worker",
                settings=settings | {"worker_id": "victim"},
                fate={"crash": ("append", number, when), "step_s": STEP_S},
            )
            # The job may have fewer commits.
            over = partial(is_over, connection, keys, job.job_id, victim, ended)
            await wait_until_async(over, what="the end of the victim or of its job")
            num_killed += victim in ended
            heir = f"{queue}-heir"
            await forked.spawn(heir, "worker", settings=settings | {"worker_id": "heir"}, fate={})
            result = await job.result(HANGS_S)
            entries = await connection.xrange(keys.tokens(job.job_id))
        for process in (victim, heir):
            forked.signal(process, signal.SIGKILL)
        found = [(each.token_ids, each.text, each.finish_reason) for each in result.choices]
        assert found == uninterrupted[name], f"killed {when} commit {number}"
        assert result.usage["num_output_tokens"] == sum(len(token_ids) for token_ids, _, _ in found)
        decode_log(job.job_id, 0, entries)
    assert num_killed >= (2 if name == "uneven" else 2 * (NUM_TOKENS // MAX_STEPS_AHEAD + 1))
    await connection.aclose()
