"""The worker fills in what a job leaves open: the model's sampling parameters, and its length."""

import json
import shutil
from dataclasses import asdict

import pytest

from ingine.contract.events import TokensEvent
from ingine.contract.jobs import EXPECTED_OUTPUT_TOKENS, Job
from ingine.engine.config import EngineConfig
from ingine.engine.engine import Engine
from ingine.engine.limits import RequestLimits
from ingine.sampling_params import SamplingParams
from ingine.worker.hosting.pipe import make_unpacker, pack
from ingine.worker.shares import Shares
from tests.worker.test_worker import leave_behind

PROMPT = tuple(range(60, 70))
OWN = {"temperature": 0.0, "repetition_penalty": 20.0, "max_new_tokens": 60}


@pytest.fixture(scope="module")
def opinionated(tiny_model, tmp_path_factory) -> str:
    """The tiny model with sampling parameters of its own."""
    folder = tmp_path_factory.mktemp("opinionated") / "model"
    shutil.copytree(tiny_model, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | OWN))
    return str(folder)


def engine_of(model: str, **options) -> Engine:
    defaults = {"dtype": "float32", "device": "cpu", "max_num_seqs": 4, "kv_cache_bytes": 1 << 20}
    return Engine(EngineConfig(model=model, **defaults | options))


@pytest.fixture
def run(harness):
    """The token ids of a job with these sampling fields, and how it ended."""

    async def run(worker, name: str, **sampling) -> tuple[list[int], str]:
        await worker.push(Job(id=name, prompt=PROMPT, sampling=SamplingParams(**sampling)))
        *tokens, end = await worker.events(name)
        return [token_id for event in tokens for token_id in event.token_ids], end.finish_reason

    return run


async def test_a_jobs_open_fields_are_the_models_own(harness, opinionated, run):
    worker = await harness(engine_of(opinionated))
    own = await run(worker, "own")
    spelt_out = {"temperature": 0, "repetition_penalty": 20.0, "max_tokens": 60}
    assert own == await run(worker, "spelt-out", **spelt_out)
    assert own == await run(worker, "seeded", seed=7)  # greedy: the seed does not matter
    # What is given goes first, also at vLLM's neutral value.
    neutral = await run(worker, "neutral", repetition_penalty=1.0, ignore_eos=True)
    assert neutral != own
    assert await run(worker, "drawn", temperature=1.0, seed=1) != own
    tokens, reason = await run(worker, "longer", max_tokens=63, ignore_eos=True)
    assert (len(tokens), reason) == (63, "length")


async def test_a_minimum_over_the_models_own_maximum_goes_first(harness, opinionated, run):
    worker = await harness(engine_of(opinionated))
    tokens, reason = await run(worker, "at-least", min_tokens=70, ignore_eos=True)
    assert (len(tokens), reason) == (512 - len(PROMPT), "length")


async def test_with_generation_config_vllm_they_are_neutral(harness, opinionated, run):
    worker = await harness(engine_of(opinionated, generation_config="vllm", max_model_len=30))
    tokens, reason = await run(worker, "a", temperature=0, ignore_eos=True)
    assert (len(tokens), reason) == (20, "length")
    greedy = await run(worker, "greedy", temperature=0, repetition_penalty=1.0, ignore_eos=True)
    assert greedy == (tokens, reason)


async def test_a_job_that_is_resumed_has_the_same_defaults(harness, step_by_step, opinionated):
    worker = await harness(engine_of(opinionated))
    job = Job(id="whole", prompt=PROMPT)
    await worker.push(job)
    whole = await worker.events("whole")
    await leave_behind(worker, job.model_copy(update={"id": "again"}), whole[:3])
    again = await worker.events("again")
    assert again[:-1] == whole[:-1]
    assert again[-1].finish_reason == whole[-1].finish_reason


@pytest.mark.parametrize("max_tokens", [None, 10**9])
async def test_without_a_limit_of_its_own_a_job_ends_with_the_models_length(
    harness, tiny_engine, monkeypatch, max_tokens
):
    """This includes requests for more tokens than any model has: nothing is reserved or counted for them."""
    worker = await harness(tiny_engine(max_model_len=300))
    charged = []
    enter = Shares.enter
    monkeypatch.setattr(
        Shares, "enter", lambda self, key, num, *rest: charged.append(num) or enter(self, key, num, *rest)
    )
    job = Job(
        id="a", prompt=PROMPT, sampling=SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    )
    await worker.push(job)
    end = await worker.end("a")
    assert charged == [len(PROMPT) + EXPECTED_OUTPUT_TOKENS if max_tokens is None else 300]
    assert (end.position, end.finish_reason) == (290, "length")


async def test_a_worker_with_a_shorter_length_ends_a_job_where_it_stands(harness, tiny_engine):
    """Committed tokens stay: the log is not shortened, and nothing is added to it."""
    worker = await harness(tiny_engine(max_model_len=15))
    log = [TokensEvent(position, [65], "a") for position in range(1, 9)]
    await leave_behind(worker, Job(id="a", prompt=PROMPT), log)
    events = await worker.events("a")
    assert events[:-1] == log
    assert (events[-1].status, events[-1].finish_reason) == ("finished", "length")


async def test_a_worker_with_a_longer_length_goes_on(harness, tiny_engine):
    worker = await harness(tiny_engine(max_model_len=30))
    log = [TokensEvent(5, [65] * 5, "aaaaa")]
    await leave_behind(
        worker, Job(id="a", prompt=PROMPT, sampling=SamplingParams(temperature=0, ignore_eos=True)), log
    )
    end = await worker.end("a")
    assert (end.position, end.finish_reason) == (20, "length")


def test_a_worker_whose_engine_is_in_another_process_is_told_them():
    """They come with the limits, in one message."""
    limits = RequestLimits(30, 20, 10, sampling_defaults={"temperature": 0.7, "top_k": 5, "max_tokens": 6})
    unpacker = make_unpacker()
    unpacker.feed(pack("built", asdict(limits)))
    [[_, told]] = unpacker
    assert RequestLimits(**told) == limits
