"""Prompts that cost too much: they end alone, and nobody waits for them but who sent them."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import worker.prompt_process
import worker.prompts
from ingine.errors import EngineError, ErrorCode, InvalidRequest
from ingine.sampling_params import SamplingParams
from ingine.tokenizer import Tokenizer
from ingine.wire import Job, JobStatus, Message
from tests.tiny_models import CHAT_TEMPLATE, make_tokenizer
from tests.waiting import HANGS_S, wait_until, wait_until_async
from tests.worker import engine_program
from worker.prompt_process import PromptProcess

GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
HOSTILE = (
    "{% set said = messages[0].content %}"
    "{% if said == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    "{% elif said == 'memory' %}{{ said * 10 ** 9 }}"
    "{% elif said == 'output' %}{% for i in range(99999) %}{{ said * 1000 }}{% endfor %}"
    "{% elif said == 'nest' %}{% macro nest() %}{{ nest() }}{% endmacro %}{{ nest() }}"
    "{% else %}" + CHAT_TEMPLATE + "{% endif %}"
)


def says(content: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": content}]


def chat(job_id: str, content: str, **fields) -> Job:
    return Job(id=job_id, messages=(Message(role="user", content=content),), sampling=GREEDY, **fields)


@pytest.fixture
def start_process():
    """Processes with a tiny tokenizer, which are ended after the test."""
    started = []

    def start(template: str = HOSTILE, **options) -> PromptProcess:
        definition = Tokenizer.from_transformers(make_tokenizer(template)).definition()
        started.append(PromptProcess(definition, 512, **{"max_in_flight": 1} | options))
        return started[-1]

    yield start
    for process in started:
        assert process.popen is None or process.popen.poll() is not None, "it is closed"


async def ready(process: PromptProcess) -> int:
    """Its pid, once it reads."""
    await process.read("", 60, "x")
    return process.popen.pid


async def code_of(reading) -> tuple[ErrorCode, str]:
    with pytest.raises(InvalidRequest) as raised:
        await reading
    return raised.value.code, str(raised.value)


# ------------------------------------------------------------------------------------- the process


@pytest.mark.parametrize(
    ("content", "code", "reason"),
    [
        ("loop", ErrorCode.PROMPT_TOO_COSTLY, "processor time"),
        ("memory", ErrorCode.PROMPT_TOO_COSTLY, "memory"),
        ("output", ErrorCode.PROMPT_TOO_LONG, "characters"),
        ("nest", ErrorCode.INVALID_MESSAGES, "recursion"),
    ],
)
async def test_a_template_that_runs_wild_ends_its_prompt_alone(start_process, content, code, reason):
    process = start_process(max_in_flight=3)
    contents = ["before", content, "behind", "last"]
    reading = [asyncio.create_task(process.read("", 0.5, says(each), 0.0)) for each in contents]
    before, wild, *behind = await asyncio.gather(*reading, return_exceptions=True)
    assert (wild.code, reason in str(wild)) == (code, True)
    tokenizer = Tokenizer.from_transformers(make_tokenizer(HOSTILE))
    for content, token_ids in zip(["before", "behind", "last"], [before, *behind], strict=True):
        assert token_ids == tokenizer.encode_chat(says(content))
    await process.close()


async def test_tenants_take_turns(start_process):
    process, order = start_process(), []

    async def read(tenant: str, text: str) -> None:
        await process.read(tenant, 60, text)
        order.append(text)

    flood = [asyncio.create_task(read("a", f"a{number}")) for number in range(4)]
    await asyncio.sleep(0)
    others = [asyncio.create_task(read(tenant, tenant)) for tenant in ("b", "c")]
    await asyncio.gather(*flood, *others)
    assert order == ["a0", "b", "c", "a1", "a2", "a3"]
    await process.close()


async def test_who_has_given_up_is_not_read(start_process):
    process = start_process()
    given_up = asyncio.create_task(process.read("a", 60, says("loop"), 0.0))
    await asyncio.sleep(0)
    given_up.cancel()
    assert len(await process.read("b", 60, "x")) == 1
    assert len(await process.read("a", 60, "y")) == 1
    await process.close()


async def test_a_prompt_whose_process_somebody_kills_is_tried_once_more(start_process, monkeypatch):
    process = start_process(max_in_flight=2)
    for kills in (1, 2):
        pid = await ready(process)
        os.kill(pid, signal.SIGSTOP)
        reading = [asyncio.create_task(process.read("", 60, text)) for text in ("xy", "xyz")]
        await wait_until_async(lambda: len(process._in_flight) == 2)
        if kills == 2:
            monkeypatch.setattr(
                worker.prompt_process, "command", lambda: [sys.executable, "-c", STANDS_STILL]
            )
        os.kill(pid, signal.SIGKILL)
        if kills == 1:
            assert list(map(len, await asyncio.gather(*reading))) == [2, 3]
    await wait_until_async(lambda: process.popen.pid != pid and process._in_flight, what="the second try")
    monkeypatch.undo()
    process.popen.kill()
    assert (await code_of(reading[0]))[0] == ErrorCode.PROMPT_TOO_COSTLY
    assert len(await reading[1]) == 3
    await process.close()


STANDS_STILL = """
import socket, time
connection = socket.socket(fileno=0)
connection.sendall(b"\\x90")
time.sleep(600)
"""
"""Says that it is ready, and reads nothing."""


async def test_a_process_that_stands_still_is_killed(start_process, monkeypatch):
    process = start_process()
    os.kill(await ready(process), signal.SIGSTOP)
    monkeypatch.setattr(worker.prompt_process, "SILENCE_S", 0.1)
    reading = asyncio.create_task(process.read("", 0.1, "x"))
    await wait_until_async(lambda: process._in_flight)
    monkeypatch.undo()
    assert (await code_of(reading))[0] == ErrorCode.PROMPT_TOO_COSTLY
    assert len(await process.read("", 60, "x")) == 1
    await process.close()


async def test_a_machine_without_threads_gives_nobody_what_another_asked_for(start_process, monkeypatch):
    """None can be had to wait for the process that has ended."""
    process, to_thread = start_process(), asyncio.to_thread
    os.kill(await ready(process), signal.SIGSTOP)
    first = asyncio.create_task(process.read("", 60, "x"))
    await wait_until_async(lambda: process._in_flight)

    async def no_thread(*_):
        monkeypatch.setattr(asyncio, "to_thread", to_thread)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(asyncio, "to_thread", no_thread)
    monkeypatch.setattr(worker.prompt_process, "RESTART_DELAY_S", 0)
    process.popen.kill()
    second = asyncio.create_task(process.read("", 60, "xyz"))
    async with asyncio.timeout(HANGS_S):
        assert [len(await first), len(await second)] == [1, 3]
    await process.close()


async def test_where_no_process_can_be_started_who_waits_is_told(start_process, monkeypatch):
    process = start_process()
    monkeypatch.setattr(worker.prompt_process, "RESTART_DELAY_S", 0)
    for command in ([sys.executable, "-c", "raise SystemExit(7)"], ["/nothing/here"]):
        monkeypatch.setattr(worker.prompt_process, "command", lambda: command)  # noqa: B023
        with pytest.raises(EngineError, match=r"status 7|No such file"):
            await process.read("", 60, "x")
    monkeypatch.undo()
    assert len(await process.read("", 60, "x")) == 1
    await process.close()


async def test_a_signal_for_all_processes_of_a_service_does_not_end_it(start_process):
    process = start_process()
    pid = await ready(process)
    assert os.getsid(pid) == pid, "the terminal's Ctrl-C does not reach it"
    for signum in (signal.SIGTERM, signal.SIGINT):
        os.kill(pid, signum)
    assert len(await process.read("", 60, "x")) == 1
    assert process.popen.pid == pid
    await process.close()


PARENT = """
import asyncio, json, sys
from worker.prompt_process import PromptProcess

async def main():
    process = PromptProcess(json.loads(sys.argv[1]), 512, max_in_flight=1)
    await process.read("", 60, "x")
    busy = asyncio.create_task(process.read("", 600, [{"role": "user", "content": sys.argv[2]}], 0.0))
    await asyncio.sleep(0.1)
    print(process.popen.pid, flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


@pytest.mark.parametrize("content", ["idle", "loop"])
def test_it_ends_with_the_worker_whatever_it_is_doing(content):
    definition = Tokenizer.from_transformers(make_tokenizer(HOSTILE)).definition()
    command = [sys.executable, "-c", PARENT, json.dumps(definition), content]
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=root) as parent:
        pid = int(parent.stdout.readline())
        parent.kill()
    wait_until(lambda: not is_running(pid), what="the end of the process")


def is_running(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


# -------------------------------------------------------------------------------------- in a worker


@pytest.fixture
def hostile_engine(tiny_engine, monkeypatch):
    monkeypatch.setattr(worker.prompts, "CPU_S", 0.5)
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


async def test_while_a_prompt_is_read_others_are_begun_and_its_lease_is_kept(harness, hostile_engine):
    here = await harness(hostile_engine)
    await here.push(chat("first", "hi"))
    await here.end("first")
    os.kill(here.worker.prompts._short.popen.pid, signal.SIGSTOP)
    await here.push(chat("slow", "hi"))
    await wait_until_async(lambda: here.worker._admission._preparing, what="the slow one")
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
    await wait_until_async(lambda: len(here.worker._admission._preparing) == 3, what="three that wait")
    await here.stop()
    for number in range(3):
        record = await here.redis.hmget(here.keys.job(f"job{number}"), "status", "attempt", "deaths")
        assert record == [b"queued", b"1", b"0"]
    heir = await harness(lease_s=60)
    assert [(await heir.end(f"job{number}")).timings["attempts"] for number in range(3)] == [2, 2, 2]


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
    await wait_until_async(lambda: len(admission._preparing) >= 8, what="as many as there is room for")
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
    monkeypatch.setattr(worker.prompts, "SHORT_CHARS", 100)
    here = await harness()
    await here.push(chat("first", "x" * 200))
    await here.end("first")
    os.kill(here.worker.prompts._long.popen.pid, signal.SIGSTOP)
    await here.push(chat("long", "x" * 200))
    await here.push(chat("short", "hi"))
    assert (await here.end("short")).status is JobStatus.FINISHED
    os.kill(here.worker.prompts._long.popen.pid, signal.SIGCONT)
    assert (await here.end("long")).status is JobStatus.FINISHED


async def test_a_tokenizer_that_panics_ends_its_job_alone(harness, tiny_engine):
    from tests.engine.test_prompt_encoder import BACKTRACKS, PANICS, split_by, with_parts

    engine = tiny_engine()
    engine.tokenizer = Tokenizer(with_parts(pre_tokenizer=split_by(BACKTRACKS)))
    here = await harness(engine)
    await here.push(Job(id="bad", prompt=PANICS, sampling=GREEDY))
    await here.push(Job(id="good", prompt="x", sampling=GREEDY))
    assert (await here.end("bad")).error["code"] == ErrorCode.ENGINE_ERROR
    assert (await here.end("good")).status is JobStatus.FINISHED


async def test_beside_an_engine_in_a_process_of_its_own_it_is_the_same(harness, tiny_model):
    here = await harness(engine_program.start(str(tiny_model)))
    await here.push(chat("chat", "hi"))
    await here.push(Job(id="long", prompt="x" * 400, sampling=GREEDY))
    await here.push(Job(id="longer", prompt="1" * 5000, sampling=GREEDY))
    for job_id in ("chat", "long"):
        assert (await here.end(job_id)).status is JobStatus.FINISHED
    assert (await here.end("longer")).error["code"] == ErrorCode.PROMPT_TOO_LONG
