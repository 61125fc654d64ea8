"""Prompts that cost too much: they end alone, and nobody waits for them but who sent them."""

import asyncio
import errno
import os
import signal
from functools import partial

import msgpack
import pytest

import ingine.worker.hosting.prompt_process
import ingine.worker.preparation
import ingine.worker.prompts
from ingine.contract.chat import Message
from ingine.contract.events import TokensEvent
from ingine.contract.jobs import Job
from ingine.contract.record import JobStatus
from ingine.engine.text.conversation import Conversation
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import ErrorCode
from ingine.sampling_params import SamplingParams
from tests.engine.chat_families import FAMILIES
from tests.tiny_models import make_tokenizer
from tests.waiting import wait_until_async
from tests.worker import engine_program
from tests.worker.conftest import Harness
from tests.worker.test_prompt_process import HOSTILE
from tests.worker.test_worker import leave_behind

GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


def chat(job_id: str, content: str, **fields) -> Job:
    return Job(id=job_id, messages=(Message(role="user", content=content),), sampling=GREEDY, **fields)


@pytest.fixture
def hostile_engine(tiny_engine, monkeypatch):
    monkeypatch.setattr(ingine.worker.prompts, "CPU_S", 0.5)
    engine = tiny_engine()
    engine.tokenizer = Tokenizer.from_transformers(make_tokenizer(HOSTILE))
    return engine


async def test_a_worker_outlives_what_a_template_does(harness, hostile_engine):
    here = await harness(hostile_engine)
    for content in ("loop", "memory"):
        await here.push(chat(content, content))
    await here.push(Job(id="text", prompt="x", sampling=GREEDY))
    await here.push(chat("chat", "hi"))
    for content in ("loop", "memory"):
        assert (await here.end(content)).error["code"] == ErrorCode.PROMPT_TOO_COSTLY
        assert await here.redis.hmget(here.keys.job(content), "attempt", "deaths") == [b"1", b"0"]
    for job_id in ("text", "chat"):
        assert (await here.end(job_id)).status is JobStatus.FINISHED
    assert not here.running.done()


async def test_all_of_a_chat_reaches_the_template(harness, tiny_engine):
    engine = tiny_engine()
    engine.tokenizer = Tokenizer.from_transformers(make_tokenizer(FAMILIES["qwen3"]))
    here = await harness(engine)
    function = {"name": "f", "parameters": {"type": "object", "properties": {"b": {}, "a": {}}}}
    call = {"type": "function", "function": {"name": "f", "arguments": '{"b": 1}'}}
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}, {"type": "text", "text": "Hi"}]},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "1"},
    ]
    tools = [{"type": "function", "function": function}]
    jobs = {
        "all": {"tools": tools, "chat_template_kwargs": {"enable_thinking": False}},
        "nothing": {"add_generation_prompt": False},
        "special": {"allow_special_tokens": True},
        "continued": {
            "messages": [*messages, {"role": "assistant", "content": "So"}],
            "add_generation_prompt": False,
            "continue_final_message": True,
        },
    }
    lengths = {}
    for job_id, fields in jobs.items():
        await here.push(Job(id=job_id, sampling=GREEDY, **{"messages": messages} | fields))
        names = {"chat_template_kwargs": "template_kwargs"}
        fields = {names.get(name, name): value for name, value in fields.items()}
        expected = Conversation(**{"messages": messages} | fields)
        lengths[job_id] = (await here.end(job_id)).usage["num_prompt_tokens"]
        assert lengths[job_id] == len(engine.tokenizer.encode_chat(expected))
    assert len(set(lengths.values())) == len(jobs)


async def test_a_template_that_does_not_take_a_chat_ends_that_job_alone(harness, tiny_engine):
    engine = tiny_engine()
    refusing = "{{ raise_exception('no tools') if tools }}{{ messages[0].content }}"
    engine.tokenizer = Tokenizer.from_transformers(make_tokenizer(refusing))
    here = await harness(engine)
    tools = [{"type": "function", "function": {"name": "f"}}]
    await here.push(chat("refused", "hi", tools=tools))
    await here.push(chat("taken", "hi"))
    error = (await here.end("refused")).error
    assert (error["code"], "no tools" in error["message"]) == (ErrorCode.INVALID_MESSAGES, True)
    assert (await here.end("taken")).status is JobStatus.FINISHED


async def test_while_a_prompt_is_read_others_are_begun_and_its_lease_is_kept(harness, hostile_engine):
    here = await harness(hostile_engine)
    await here.push(chat("first", "hi"))
    await here.end("first")
    os.kill(here.worker.prompts._short.popen.pid, signal.SIGSTOP)
    await here.push(chat("slow", "hi"))
    await wait_until_async(lambda: here.worker._admission._preparation, what="the slow one")
    for number in range(4):
        await here.push(Job(id=f"quick{number}", prompt="x", sampling=GREEDY))
        assert (await here.end(f"quick{number}")).status is JobStatus.FINISHED
    assert [job.id for job in here.worker._jobs.leased()] == ["slow"]
    here.worker._partitions[0].intake._lost_delivery = True  # after an outage it is delivered anew
    os.kill(here.worker.prompts._short.popen.pid, signal.SIGCONT)
    end = await here.end("slow")
    assert (end.status, end.timings["attempts"]) == (JobStatus.FINISHED, 1)


async def test_what_waits_to_be_read_is_handed_over(harness, hostile_engine):
    here = await harness(hostile_engine, lease_s=60)
    await here.push(chat("first", "hi"))
    await here.end("first")
    os.kill(here.worker.prompts._short.popen.pid, signal.SIGSTOP)
    for number in range(3):
        await here.push(chat(f"job{number}", "hi"))
    await wait_until_async(lambda: len(here.worker._admission._preparation) == 3, what="three that wait")
    await here.stop()
    for number in range(3):
        record = await here.redis.hmget(here.keys.job(f"job{number}"), "status", "attempt", "deaths")
        assert record == [b"queued", b"1", b"0"]
    heir = await harness(lease_s=60)
    assert [(await heir.end(f"job{number}")).timings["attempts"] for number in range(3)] == [2, 2, 2]


@pytest.mark.parametrize("begun", ["before", "meanwhile"])
async def test_a_suspect_that_waits_to_be_read_is_handed_over(harness, hostile_engine, monkeypatch, begun):
    here = await harness(hostile_engine, lease_s=60)
    await here.push(chat("first", "hi"))
    await here.end("first")
    os.kill(here.worker.prompts._short.popen.pid, signal.SIGSTOP)
    begin, tell_released, told = here.queue.begin, here.queue.tell_released, asyncio.Event()

    async def begin_meanwhile(*args, alone, **options):
        answer = await begin(*args, alone=alone, **options)
        if alone:
            here.worker.stop()
            await told.wait()
        return answer

    async def tell() -> None:
        await tell_released()
        told.set()

    if begun == "meanwhile":
        monkeypatch.setattr(here.queue, "begin", begin_meanwhile)
        monkeypatch.setattr(here.queue, "tell_released", tell)
    await leave_behind(here, chat("suspect", "hi"), [], deaths=1)
    await wait_until_async(lambda: here.worker.stopping or here.worker._jobs.leased(), what="its begin")
    await here.stop()
    record = await here.redis.hmget(here.keys.job("suspect"), "status", "attempt", "deaths")
    assert record == [b"queued", b"2", b"2"]
    heir = await harness(lease_s=60)
    assert (await heir.end("suspect")).status is JobStatus.FINISHED
    assert await here.redis.hget(here.keys.job("suspect"), "deaths") == b"2"


async def test_a_deadline_ends_a_job_that_waits_to_be_read(harness, hostile_engine):
    here = await harness(hostile_engine)
    await here.push(chat("first", "hi"))
    await here.end("first")
    os.kill(here.worker.prompts._short.popen.pid, signal.SIGSTOP)
    await here.push(chat("late", "hi", deadline_ms=500))
    end = await here.end("late")
    assert (end.status, end.error["code"]) == (JobStatus.EXPIRED, ErrorCode.DEADLINE_EXCEEDED)


async def test_room_is_not_given_twice_while_prompts_are_read(harness, hostile_engine):
    here = await harness(hostile_engine)
    admission = here.worker._admission
    await here.push(chat("first", "hi"))
    await here.end("first")
    os.kill(here.worker.prompts._short.popen.pid, signal.SIGSTOP)
    for number in range(12):
        await here.push(chat(f"job{number}", "hi"))
    await wait_until_async(lambda: len(admission._preparation) >= 8, what="as many as there is room for")
    assert (admission.room, admission.idle) == (0, False)
    os.kill(here.worker.prompts._short.popen.pid, signal.SIGCONT)
    for number in range(12):
        assert (await here.end(f"job{number}")).status is JobStatus.FINISHED


async def test_what_is_too_long_costs_no_process(harness):
    here = await harness()
    await here.push(Job(id="text", prompt="1" * 900_000, sampling=GREEDY))
    messages = tuple(Message(role="u", content="") for _ in range(4000))
    await here.push(Job(id="chat", messages=messages, sampling=GREEDY))
    await here.push(Job(id="ids", prompt=(1,) * 100_000, sampling=GREEDY))
    for job_id in ("text", "chat", "ids"):
        assert (await here.end(job_id)).error["code"] == ErrorCode.PROMPT_TOO_LONG
    assert here.worker.prompts._short.popen is here.worker.prompts._long.popen is None


async def test_long_prompts_do_not_hold_up_short_ones(harness, monkeypatch):
    monkeypatch.setattr(ingine.worker.prompts, "SHORT_CHARS", 100)
    here = await harness()
    await here.push(chat("first", "x" * 200))
    await here.end("first")
    os.kill(here.worker.prompts._long.popen.pid, signal.SIGSTOP)
    await here.push(chat("long", "x" * 200))
    await here.push(chat("short", "hi"))
    assert (await here.end("short")).status is JobStatus.FINISHED
    os.kill(here.worker.prompts._long.popen.pid, signal.SIGCONT)
    assert (await here.end("long")).status is JobStatus.FINISHED


def let_no_process_start(here: Harness, monkeypatch) -> None:
    monkeypatch.setattr(ingine.worker.hosting.prompt_process, "RESTART_DELAY_S", 0)
    monkeypatch.setattr(ingine.worker.hosting.prompt_process, "RETRY_S", 0.1)

    def no_memory():
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    for process in (here.worker.prompts._short, here.worker.prompts._long):
        monkeypatch.setattr(process, "_spawn", no_memory)


async def test_a_worker_that_can_start_no_process_leaves_its_jobs_to_its_peers(harness, monkeypatch):
    monkeypatch.setattr(ingine.worker.preparation, "REST_S", 3600)
    here = await harness()
    let_no_process_start(here, monkeypatch)
    log = [TokensEvent(1, [65], "A")]
    beat = {"at_s": (await here.redis.time())[0] + 60}
    await here.redis.hset(here.keys.workers, "another", msgpack.packb(beat))
    await leave_behind(here, chat("begun", "hi"), log)
    await here.push(chat("new", "hi", metadata={"row": 1}))
    for job_id in ("begun", "new"):
        await wait_until_async(partial(is_put_off, here, job_id), what="a job that is put off")
    assert here.worker._admission.room == 0 and not here.running.done()
    peer = await harness()
    for job_id, deaths in (("begun", b"1"), ("new", b"0")):
        assert (await peer.end(job_id)).status is JobStatus.FINISHED
        record = await here.redis.hmget(here.keys.job(job_id), "worker", "deaths")
        assert record == [peer.worker.id.encode(), deaths]
    assert (await peer.events("begun"))[0] == log[0]


async def test_a_worker_without_peers_runs_at_once_what_needs_no_process(harness, monkeypatch):
    monkeypatch.setattr(ingine.worker.preparation, "REST_S", 3600)
    here = await harness()
    let_no_process_start(here, monkeypatch)
    await here.redis.hset(here.keys.workers, "dead", msgpack.packb({"at_s": 1}))
    await here.push(chat("chat", "hi"))
    await wait_until_async(partial(is_put_off, here, "chat"), what="a job that is put off")
    await here.push(Job(id="text", prompt="x", sampling=GREEDY))
    assert (await here.end("text")).status is JobStatus.FINISHED


async def test_the_pause_of_a_job_that_is_put_off_doubles(harness, monkeypatch):
    here, pauses = await harness(), []
    let_no_process_start(here, monkeypatch)
    delay = here.queue.delay

    async def delay_no_longer(entry, job_id, attempt, pause_s):
        pauses.append(pause_s)
        return await delay(entry, job_id, attempt, 0.0)

    monkeypatch.setattr(here.queue, "delay", delay_no_longer)
    await here.push(chat("chat", "hi"))
    await wait_until_async(lambda: len(pauses) >= 8, what="the longest pause, twice")
    assert pauses[:8] == [1, 2, 4, 8, 16, 32, 60, 60]


async def is_put_off(here: Harness, job_id: str) -> bool:
    return await here.redis.hget(here.keys.job(job_id), "status") == b"delayed"


async def test_a_worker_that_can_start_no_process_says_so_and_runs_what_needs_none(harness, monkeypatch):
    monkeypatch.setattr(ingine.worker.preparation, "REST_S", 0.1)
    here = await harness()
    await wait_until_async(lambda: here.worker._health.unready() is None, what="the start")
    let_no_process_start(here, monkeypatch)
    await here.push(chat("chat", "hi"))
    await wait_until_async(here.worker._health.unready, what="that it is not ready")
    assert "Cannot allocate memory" in here.worker._health.unready()
    assert here.worker._health.unhealthy() is None
    await here.push(Job(id="text", prompt="x", sampling=GREEDY))
    assert (await here.end("text")).status is JobStatus.FINISHED
    monkeypatch.undo()
    await wait_until_async(lambda: here.worker._health.unready() is None, what="that it is ready")
    assert (await here.end("chat")).status is JobStatus.FINISHED


async def test_a_deadline_ends_a_job_that_no_worker_can_read(harness, monkeypatch):
    monkeypatch.setattr(ingine.worker.preparation, "REST_S", 0.1)
    here = await harness()
    let_no_process_start(here, monkeypatch)
    await here.push(chat("chat", "hi", deadline_ms=3000))
    end = await here.end("chat")
    assert (end.status, end.error["code"]) == (JobStatus.EXPIRED, ErrorCode.DEADLINE_EXCEEDED)
    assert end.timings["attempts"] > 1
    assert await here.redis.hget(here.keys.job("chat"), "deaths") == b"0"


@pytest.mark.parametrize("log_prompts", [False, True])
async def test_a_tokenizer_that_panics_ends_its_job_alone(harness, tiny_engine, caplog, log_prompts):
    """Its message quotes the prompt, so it is only logged if prompts may be logged."""
    from tests.engine.test_prompt_encoder import BACKTRACKS, PANICS, split_by, with_parts

    engine = tiny_engine()
    engine.tokenizer = Tokenizer(with_parts(pre_tokenizer=split_by(BACKTRACKS)))
    here = await harness(engine, log_prompts=log_prompts)
    await here.push(Job(id="bad", prompt=PANICS, sampling=GREEDY))
    await here.push(Job(id="good", prompt="x", sampling=GREEDY))
    message = "the prompt cannot be tokenised: RuntimeError"
    assert (await here.end("bad")).error == {"code": ErrorCode.ENGINE_ERROR, "message": message}
    (logged,) = (record.fields for record in caplog.records if record.message == "prompt not read")
    assert logged["job_id"] == "bad"
    assert ("retry-limit" in logged["error"]) is log_prompts
    assert (await here.end("good")).status is JobStatus.FINISHED


async def test_beside_an_engine_in_a_process_of_its_own_it_is_the_same(harness, tiny_model):
    here = await harness(engine_program.start(str(tiny_model)))
    await here.push(chat("chat", "hi"))
    await here.push(Job(id="long", prompt="x" * 400, sampling=GREEDY))
    await here.push(Job(id="longer", prompt="1" * 5000, sampling=GREEDY))
    for job_id in ("chat", "long"):
        assert (await here.end(job_id)).status is JobStatus.FINISHED
    assert (await here.end("longer")).error["code"] == ErrorCode.PROMPT_TOO_LONG
