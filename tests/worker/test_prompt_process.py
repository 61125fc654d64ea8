"""The process that reads prompts: what ends it, who is to blame, and who starts the next one."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ingine.worker.hosting.prompt_process
from ingine.engine.limits import RequestLimits
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import ErrorCode, InvalidRequest
from ingine.structured_outputs import StructuredOutputsParams
from ingine.worker.hosting.prompt_process import Kind, NoPromptProcess, PromptProcess
from tests.tiny_models import CHAT_TEMPLATE, EOS_TOKEN_ID, VOCAB_SIZE, make_tokenizer
from tests.waiting import HANGS_S, wait_until, wait_until_async

LIMITS = RequestLimits(
    max_model_len=512, num_kv_tokens=512, vocab_size=VOCAB_SIZE, eos_token_ids=(EOS_TOKEN_ID,)
)
HOSTILE = (
    "{% set said = messages[0].content %}"
    "{% if said == 'loop' %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    "{% elif said == 'memory' %}{{ said * 10 ** 9 }}"
    "{% elif said == 'output' %}{% for i in range(99999) %}{{ said * 1000 }}{% endfor %}"
    "{% elif said == 'nest' %}{% macro nest() %}{{ nest() }}{% endmacro %}{{ nest() }}"
    "{% else %}" + CHAT_TEMPLATE + "{% endif %}"
)


def says(content: str) -> dict[str, list[dict[str, str]]]:
    return {"messages": [{"role": "user", "content": content}]}


@pytest.fixture
def start_process():
    """Processes with a tiny tokenizer, which are ended after the test."""
    started = []

    def start(template: str = HOSTILE, **options) -> PromptProcess:
        definition = Tokenizer.from_transformers(make_tokenizer(template)).definition()
        started.append(PromptProcess(definition, LIMITS, **{"max_in_flight": 1} | options))
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
        assert token_ids == tokenizer.encode_chat(**says(content))
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


async def being_read(process: PromptProcess) -> int:
    """Its pid, once the process has begun a prompt."""
    await wait_until_async(lambda: process._reading, what="its beginning")
    return process.popen.pid


async def test_a_prompt_whose_process_somebody_kills_is_tried_once_more(start_process):
    process = start_process(max_in_flight=2)
    killed = asyncio.create_task(process.read("", 600, says("loop"), 0.0))
    behind = asyncio.create_task(process.read("", 60, "xyz"))
    os.kill(first := await being_read(process), signal.SIGKILL)
    await wait_until_async(lambda: process.popen.pid != first, what="the second try")
    os.kill(await being_read(process), signal.SIGKILL)
    assert (await code_of(killed))[0] == ErrorCode.PROMPT_TOO_COSTLY
    assert len(await behind) == 3
    await process.close()


async def test_what_a_process_has_not_begun_is_not_to_blame_for_its_end(start_process):
    process = start_process(max_in_flight=2)
    os.kill(pid := await ready(process), signal.SIGSTOP)
    reading = [asyncio.create_task(process.read("", 60, text)) for text in ("xy", "xyz")]
    await wait_until_async(lambda: len(process._in_flight) == 2)
    for signum in (signal.SIGABRT, signal.SIGCONT):  # it goes on with its end
        os.kill(pid, signum)
    assert [len(await each) for each in reading] == [2, 3]
    await process.close()


async def test_what_is_sent_to_a_dead_process_is_not_to_blame(start_process):
    """It has ended, and the loop has not heard of it yet."""
    process = start_process()
    await ready(process)
    os.kill(process.popen.pid, signal.SIGABRT)
    process.popen.wait()
    assert len(await process.read("", 60, "xyz")) == 3
    await process.close()


BEGINS_NOTHING = """
import os, socket
connection = socket.socket(fileno=0)
connection.recv(1 << 20)
connection.sendall(b"\\x91\\xa5ready")
connection.recv(1 << 20)
os._exit(7)
"""
"""Says that it is ready, and ends at the first prompt, without a word."""


async def test_processes_that_begin_nothing_are_given_up(start_process, monkeypatch):
    process = start_process()
    monkeypatch.setattr(ingine.worker.hosting.prompt_process, "RESTART_DELAY_S", 0)
    monkeypatch.setattr(
        ingine.worker.hosting.prompt_process, "command", lambda: [sys.executable, "-c", BEGINS_NOTHING]
    )
    async with asyncio.timeout(HANGS_S):
        with pytest.raises(NoPromptProcess, match="status 7"):
            await process.read("", 60, "x")
    await process.close()


BEGINS_ONE = """
import os, signal, socket
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
connection = socket.socket(fileno=0)
connection.recv(1 << 20)
connection.sendall(b"\\x91\\xa5ready")
connection.recv(1 << 20)
signal.sigwait([signal.SIGUSR1])
connection.sendall(b"\\x91\\xa5begun")
os._exit(7)
"""
"""Ends at the first prompt, which it says it has begun, when it is told to."""


async def test_what_a_process_has_begun_is_to_blame_though_another_was_sent_to_it(start_process, monkeypatch):
    """It has said so and ended, and the loop, which has not read that yet, finds that it cannot write."""
    process = start_process(max_in_flight=2)
    monkeypatch.setattr(
        ingine.worker.hosting.prompt_process, "command", lambda: [sys.executable, "-c", BEGINS_ONE]
    )
    begun = asyncio.create_task(process.read("", 60, "x"))
    await wait_until_async(lambda: process._in_flight, what="a process that reads")
    monkeypatch.undo()
    os.kill(process.popen.pid, signal.SIGUSR1)
    process.popen.wait(HANGS_S)
    behind = asyncio.create_task(process.read("", 60, "xyz"))
    code, reason = await code_of(begun)
    assert (code, "status 7" in reason) == (ErrorCode.PROMPT_TOO_COSTLY, True)
    assert len(await behind) == 3
    await process.close()


async def test_a_process_that_stands_still_is_killed(start_process, monkeypatch):
    process = start_process()
    os.kill(await ready(process), signal.SIGSTOP)
    monkeypatch.setattr(ingine.worker.hosting.prompt_process, "SILENCE_S", 0.1)
    reading = asyncio.create_task(process.read("", 0.1, "x"))
    await wait_until_async(lambda: process._in_flight)
    monkeypatch.undo()
    assert len(await reading) == 1, "it was not begun, and is read by the next one"
    await process.close()


async def test_a_process_that_may_compute_for_long_is_waited_for_longer(start_process, monkeypatch):
    """A busy machine needs several times as long for the processor time that a prompt may take."""
    process = start_process()
    pid = await ready(process)
    os.kill(pid, signal.SIGSTOP)
    monkeypatch.setattr(ingine.worker.hosting.prompt_process, "SILENCE_S", 0.0)
    reading = asyncio.create_task(process.read("", HANGS_S, "x"))
    await asyncio.sleep(0.01)  # longer than a silence may last without it
    os.kill(pid, signal.SIGCONT)
    assert len(await reading) == 1
    assert process.popen.pid == pid
    await process.close()


async def test_a_prompt_at_which_a_process_stands_still_has_no_other_try(start_process, monkeypatch):
    process = start_process()
    reading = asyncio.create_task(process.read("", 600, says("loop"), 0.0))
    os.kill(await being_read(process), signal.SIGSTOP)
    monkeypatch.setattr(ingine.worker.hosting.prompt_process, "SILENCE_S", 0.1)
    monkeypatch.setattr(ingine.worker.hosting.prompt_process, "CLOCK_PER_CPU_S", 0.0)
    process._watch()
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
    monkeypatch.setattr(ingine.worker.hosting.prompt_process, "RESTART_DELAY_S", 0)
    process.popen.kill()
    second = asyncio.create_task(process.read("", 60, "xyz"))
    async with asyncio.timeout(HANGS_S):
        assert [len(await first), len(await second)] == [1, 3]
    await process.close()


@pytest.mark.parametrize(
    ("command", "reason"),
    [([sys.executable, "-c", "raise SystemExit(7)"], "status 7"), (["/nothing/here"], "No such file")],
)
async def test_where_no_process_can_be_started_who_waits_is_told(start_process, monkeypatch, command, reason):
    process = start_process()
    monkeypatch.setattr(ingine.worker.hosting.prompt_process, "RESTART_DELAY_S", 0)
    monkeypatch.setattr(ingine.worker.hosting.prompt_process, "RETRY_S", 0.1)
    monkeypatch.setattr(ingine.worker.hosting.prompt_process, "command", lambda: command)
    for _ in range(2):  # the second one at once
        with pytest.raises(NoPromptProcess, match=reason):
            await process.read("", 60, "x")
        assert reason in process.start_error
    monkeypatch.undo()
    await wait_until_async(lambda: process.start_error is None, what="one that starts, without being asked")
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
from ingine.engine.limits import RequestLimits
from ingine.worker.hosting.prompt_process import NoPromptProcess, PromptProcess

async def main():
    limits = RequestLimits(max_model_len=512, num_kv_tokens=512, vocab_size=259)
    process = PromptProcess(json.loads(sys.argv[1]), limits, max_in_flight=1)
    await process.read("", 60, "x")
    conversation = {"messages": [{"role": "user", "content": sys.argv[2]}]}
    busy = asyncio.create_task(process.read("", 600, conversation, 0.0))
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


GRAMMARS = {
    "fine": ({"json": {"type": "object", "properties": {"a": {"type": "integer"}}}}, None),
    "unsupported": ({"json": {"not": {}}}, ErrorCode.UNSUPPORTED_GRAMMAR),
    "wrong": ({"regex": "(a"}, ErrorCode.INVALID_GRAMMAR),
    "properties": (
        {"json": {"type": "object", "properties": {f"property {i}": {} for i in range(4000)}}},
        ErrorCode.GRAMMAR_TOO_COSTLY,
    ),
    "alternatives": (
        {"grammar": "start: " + " ".join('("a"|"b")*' for _ in range(9000))},
        ErrorCode.GRAMMAR_TOO_COSTLY,
    ),
    "rules": (
        {
            "grammar": "".join(f'r{i} ::= r{i + 1} "a"\n' for i in range(5000))
            + 'r5000 ::= "b"\nroot ::= r0\n'
        },
        ErrorCode.GRAMMAR_TOO_COSTLY,
    ),
}


@pytest.mark.parametrize("name", GRAMMARS)
async def test_a_grammar_is_compiled_there_whatever_it_costs(start_process, name):
    asked, code = GRAMMARS[name]
    process = start_process(CHAT_TEMPLATE)
    given = StructuredOutputsParams(**asked).given()
    if code is None:
        assert await process.read("", 60, given, kind=Kind.GRAMMAR) == []
    else:
        assert (await code_of(process.read("", 1.0, given, kind=Kind.GRAMMAR)))[0] == code
    assert await process.read("", 60, "ab") == [65 + 32 - 33, 66 + 32 - 33]  # others go on
    await process.close()
