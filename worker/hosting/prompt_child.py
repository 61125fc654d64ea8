"""The program of a process that reads prompts: `python -m ingine.worker.hosting.prompt_child`.

Its standard input is a socket to the worker that started it, see `hosting.prompt_process`. Here a prompt may
loop or fill memory: the kernel ends this process then, and the worker starts another. Loads neither torch
nor transformers.
"""

import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgpack

from ingine.engine.text.prompt_encoder import PromptEncoder
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import ErrorCode, InvalidRequest
from ingine.worker.child import die_with_parent

MEMORY_BYTES = 1 << 30
"""What reading a prompt may take: some 200 bytes a token, and the longest prompts have a million."""

MAX_REASON_CHARS = 500
EXIT_OUT_OF_MEMORY = 3
"""So that the next prompt finds a process as the first one did."""


def command() -> list[str]:
    """How to start it."""
    # -P: a folder `worker` where we were started is not this package.
    return [sys.executable, "-P", "-m", "ingine.worker.hosting.prompt_child"]


def main() -> None:
    # A service manager's SIGTERM may be for all processes. The worker hands over first.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    die_with_parent()
    connection = socket.socket(fileno=os.dup(0))
    _point_at_nothing(0)
    messages = _receive(connection)
    try:
        *definition, max_num_tokens = next(messages)
        encoder = PromptEncoder(Tokenizer.from_definition(definition), max_num_tokens)
        # Panics and failed allocations would write a line of their own each: the job's error tells of them.
        _point_at_nothing(1)
        _point_at_nothing(2)
        _limit_memory()
        connection.sendall(msgpack.packb(["ready"]))
        for cpu_s, *prompt in messages:
            connection.sendall(msgpack.packb(["begun"]))
            signal.setitimer(signal.ITIMER_PROF, cpu_s)  # SIGPROF ends the process
            answer = _read(encoder, prompt)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.sendall(msgpack.packb(answer))
    except (ConnectionError, StopIteration):
        pass  # the worker is gone


def _read(encoder: PromptEncoder, prompt: list[Any]) -> list[Any]:
    """["read", token ids], ["too long", their number], or ["refused", error code, message]."""
    try:
        match prompt:
            case [text]:
                token_ids = encoder.encode(text)
            case [messages, submitted_at]:
                token_ids = encoder.encode_chat(messages, now=datetime.fromtimestamp(submitted_at, UTC))
        if len(token_ids) >= encoder.max_num_tokens:
            return ["too long", len(token_ids)]
        return ["read", token_ids]
    except MemoryError:
        os._exit(EXIT_OUT_OF_MEMORY)
    except InvalidRequest as error:
        return ["refused", str(error.code), str(error)]
    except Exception as error:  # a tokenizer that this prompt, of all, sets off
        reason = f"{type(error).__name__}: {error!s:.{MAX_REASON_CHARS}}"
        return ["refused", str(ErrorCode.ENGINE_ERROR), reason]


def _receive(connection: socket.socket) -> Iterator[list[Any]]:
    unpacker = msgpack.Unpacker(max_buffer_size=0)  # as large as need be: the worker alone sends
    while received := connection.recv(1 << 20):
        unpacker.feed(received)
        yield from unpacker


def _limit_memory() -> None:
    """From here on. Only Linux tells what is in use, and keeps to the limit."""
    if sys.platform == "linux":
        pages_in_use = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages_in_use * resource.getpagesize() + MEMORY_BYTES
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would be a file with prompts in it


def _point_at_nothing(fileno: int) -> None:
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, fileno)
    os.close(nothing)


if __name__ == "__main__":
    main()
