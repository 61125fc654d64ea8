"""Text from other programs is shown on a terminal without its control characters taking effect."""

import asyncio
import io
import json
import logging
import os
import re
import subprocess
import sys
import termios
from contextlib import suppress

import msgpack
import pytest
from redis.asyncio import Redis

from ingine.cli.main import _show_traceback
from ingine.contract.events import TokensEvent, encode_event
from ingine.contract.keys import EVENT_FIELD, Keys, log_id
from ingine.contract.record import JobStatus
from ingine.producer import AsyncClient
from ingine.terminal import EchoHandler, visible
from tests.producer.conftest import Server
from tests.producer.fake_worker import FakeWorker
from tests.waiting import HANGS_S

HOSTILE = "\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202eevil\u2066\x7f"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\x9b31m\r\u202eevil\u2066\x7f"
PIECES = ["caf", "é ", "\x1b", "]0;owned", "\x07", "\x1b[", "2J", "\x9b", "31m\r", "\u202eevil\u2066", "\x7f"]
"""The same text as tokens of a job, which cut escape sequences as a model would."""
OBEYED = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")

PROGRAM = """
import json, sys
from ingine.cli.main import main
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["ingine", *arguments]
    try:
        main()
    except SystemExit:
        pass
"""


@pytest.fixture
async def commands(valkey: Server, queue: str) -> list[list[str]]:
    """Commands that each show hostile text from the queue of this test."""
    keys = Keys(queue)
    async with valkey.connect() as redis, AsyncClient(valkey.url, queue=queue) as client:
        worker = FakeWorker(redis, keys)
        await client.submit("hi", job_id="streams")
        await client.submit("hi", job_id="fails")
        for _ in range(2):
            await worker.take()
        await commit_pieces(redis, keys)
        await worker.end("streams", len(PIECES), finish_reason="stop")
        message = {"code": "engine_error", "message": HOSTILE}
        await worker.end("fails", 0, JobStatus.FAILED, error=message)
        await client.submit("hi", job_id="waits")
        await redis.hset(keys.job("waits"), mapping={"tenant": HOSTILE, "worker": HOSTILE, "trace": HOSTILE})
        now_s, _ = await redis.time()
        beat = {"state": HOSTILE, "at_s": now_s, "model": HOSTILE, HOSTILE: HOSTILE}
        await redis.hset(keys.workers, HOSTILE, msgpack.packb(beat))
        letter = {"job": HOSTILE, "code": HOSTILE, "reason": HOSTILE, "stream": HOSTILE, "worker": HOSTILE}
        dead = await redis.xadd(keys.dead, letter | {"entry": "1-0", "deliveries": 1})
    where = ["--redis-url", valkey.url, "--queue", queue]
    shown = [["stream", "streams"], ["stream", "fails"], ["status", "waits"], ["queue", "show"]]
    shown += [["queue", "list"], ["queue", "limits"], ["dead", "list"], ["dead", "show", dead.decode()]]
    shown += [[*command, "--json"] for command in shown]
    return [[*command, *where] for command in shown]


async def commit_pieces(redis: Redis, keys: Keys) -> None:
    for position, text in enumerate(PIECES, start=1):
        event = encode_event(TokensEvent(position, [position], text))
        await redis.xadd(keys.tokens("streams"), {EVENT_FIELD: event}, id=log_id(position))
        await redis.hset(keys.job("streams"), "position", position)


def on_a_terminal(command: list[str]) -> str:
    """Everything that `command` writes to its terminal, with newlines alone as ends of lines."""
    ours, theirs = os.openpty()
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    env = os.environ | {"TERM": "xterm", "COLUMNS": "200"}
    program = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    written = b""
    with suppress(OSError):  # EIO: no process has the terminal open any more
        while part := os.read(ours, 65_536):
            written += part
    os.close(ours)
    program.wait(HANGS_S)
    return written.decode()


async def test_no_command_lets_a_terminal_obey_what_others_wrote(commands: list[list[str]]):
    command = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    written = await asyncio.to_thread(on_a_terminal, command)
    assert not OBEYED.findall(written)
    assert f"café {SHOWN}\n" in written, "the stream"
    assert f"ingine: job fails failed: {SHOWN}\n" in written
    assert written.count("owned") > len(commands), "each of them showed something of it"


async def test_a_pipe_gets_every_byte_as_it_is(commands: list[list[str]]):
    command = [sys.executable, "-c", PROGRAM, json.dumps(commands)]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, timeout=HANGS_S)
    assert f"café {HOSTILE}\n".encode() in done.stdout
    assert f"ingine: job fails failed: {HOSTILE}\n".encode() in done.stderr
    assert f"  job ?  {HOSTILE}\n".encode() in done.stdout, "the reason of a dead letter"


def test_tracebacks_and_warnings_are_shown_likewise(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", terminal)
    error = ValueError(HOSTILE)
    _show_traceback(type(error), error, None)
    logger = logging.Logger("producer.test")
    logger.addHandler(EchoHandler())
    logger.warning("no live events (%s)", HOSTILE)
    assert terminal.getvalue() == f"ValueError: {SHOWN}\nno live events ({SHOWN})\n"


def test_text_that_is_no_control_stays_as_it_is():
    harmless = "naïve 日本語 שלום 👩‍👩‍👧 ½ a\u200cb"
    assert visible(harmless) == harmless
    assert visible("a\tb\nc\u2028", keep_lines=True) == "a\tb\nc\\u2028"
    assert visible("a\tb\nc\ud83d") == r"a\tb\nc\ud83d"
