"""The program of a process that reads prompts: `python -m ingine.worker.hosting.prompt_child`.

Its standard input is a socket to the worker that started it, see `hosting.prompt_process`. A prompt that
loops or fills memory makes the kernel end this process, and the worker starts another. Imports neither torch
nor transformers.
"""

import os
import resource
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from enum import StrEnum
from functools import cache, partial
from pathlib import Path
from typing import Any

import msgpack

from ingine.engine.grammar.tools import ToolConstraint
from ingine.engine.text.bad_words import encode_bad_words
from ingine.engine.text.conversation import Conversation
from ingine.engine.text.panics import panics_as_errors
from ingine.engine.text.prompt_encoder import PromptEncoder
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import ErrorCode, InvalidRequest
from ingine.structured_outputs import StructuredOutputsParams
from ingine.worker.child import die_with_parent

MEMORY_BYTES = 1 << 30
"""Memory that reading a prompt may take: about 200 bytes per token, and the longest have a million tokens."""

MAX_REASON_CHARS = 500
EXIT_OUT_OF_MEMORY = 3
"""Exit status after a prompt ran out of memory: the next one is read by a fresh process."""


class Kind(StrEnum):
    """What a request to the process is."""

    PROMPT = "prompt"
    BAD_WORDS = "bad_words"
    GRAMMAR = "grammar"


def command() -> list[str]:
    """The command that starts this program."""
    # -P: a folder `worker` in the current folder must not shadow this package.
    return [sys.executable, "-P", "-m", "ingine.worker.hosting.prompt_child"]


def main() -> None:
    # A service manager may send SIGTERM to all processes. The worker hands over first, then ends this one.
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    die_with_parent()
    connection = socket.socket(fileno=os.dup(0))
    _point_at_nothing(0)
    messages = _receive(connection)
    try:
        *definition, max_num_tokens, vocab_size, eos_token_ids = next(messages)
        tokenizer = Tokenizer.from_definition(definition)
        encoder = PromptEncoder(tokenizer, max_num_tokens)
        compiler = cache(partial(_make_compiler, tokenizer, vocab_size, eos_token_ids))
        # Panics and failed allocations would each print a line: the job's error reports them.
        _point_at_nothing(1)
        _point_at_nothing(2)
        _limit_memory()
        connection.sendall(msgpack.packb(["ready"]))
        for cpu_s, kind, num_kept, *prompt in messages:
            connection.sendall(msgpack.packb(["begun"]))
            if kind == Kind.GRAMMAR:
                compiler()  # made once, which costs no grammar its time
            signal.setitimer(signal.ITIMER_PROF, cpu_s)  # SIGPROF ends the process
            if kind == Kind.GRAMMAR:
                answer = _compile(compiler(), *prompt)
            else:
                answer = _read(encoder, kind, num_kept, prompt)
            signal.setitimer(signal.ITIMER_PROF, 0)
            connection.sendall(msgpack.packb(answer))
    except (ConnectionError, StopIteration):
        pass  # the worker has ended


def _read(encoder: PromptEncoder, kind: str, num_kept: int | None, prompt: list[Any]) -> list[Any]:
    """Read a prompt: a text, or a conversation and the time (seconds since the epoch) when it was submitted.
    Or read bad words. num_kept: how many of a prompt's last tokens are wanted; None: all.

    Returns ["read", token ids, or a list of them], ["too long", number of tokens], or ["refused", error code,
    message].
    """
    try:
        if kind == Kind.BAD_WORDS:
            return ["read", encode_bad_words(encoder.tokenizer, prompt)]
        max_num_tokens = encoder.max_num_tokens
        if num_kept is not None:
            encoder = encoder.untruncated()
        match prompt:
            case [text]:
                token_ids = encoder.encode(text)
            case [conversation, submitted_at]:
                token_ids = encoder.encode_chat(
                    Conversation(**conversation), now=datetime.fromtimestamp(submitted_at, UTC)
                )
        if num_kept is not None:
            token_ids = token_ids[-num_kept:]
        if len(token_ids) >= max_num_tokens:
            return ["too long", len(token_ids)]
        return ["read", token_ids]
    except MemoryError:
        os._exit(EXIT_OUT_OF_MEMORY)
    except InvalidRequest as error:
        return ["refused", str(error.code), str(error)]
    except Exception as error:  # a tokenizer may raise anything
        reason = f"{type(error).__name__}: {error!s:.{MAX_REASON_CHARS}}"
        return ["refused", str(ErrorCode.ENGINE_ERROR), reason]


def _make_compiler(
    tokenizer: Tokenizer, vocab_size: int, eos_token_ids: list[int]
) -> Callable[[StructuredOutputsParams], object]:
    """Return what compiles a grammar. It keeps none, and raises InvalidRequest for each if no output of this
    model can be constrained.
    """
    from ingine.engine.grammar.compiler import GrammarCompiler
    from ingine.engine.grammar.vocabulary import GrammarVocabulary

    def refuse(_: StructuredOutputsParams) -> None:
        raise refusal

    try:
        vocabulary = GrammarVocabulary(tokenizer, vocab_size=vocab_size, eos_token_ids=eos_token_ids)
    except InvalidRequest as error:
        refusal = error
        return refuse
    return GrammarCompiler(vocabulary, max_grammars=0).compile


def _compile(
    compile: Callable[[StructuredOutputsParams], object],
    asked: dict[str, Any],
    schemas: dict[str, dict[str, Any]] | None = None,
) -> list[Any]:
    """Return ["read", []] if the grammar that `structured_outputs` asks for can be enforced, otherwise
    ["refused", error code, message]. schemas: of a `ToolConstraint`.
    """
    try:
        with panics_as_errors():
            params = StructuredOutputsParams(**asked)
            if schemas is None:
                compile(params)
            else:
                alone = {name: StructuredOutputsParams(**schema) for name, schema in schemas.items()}
                ToolConstraint(params, alone).compile(compile)
    except MemoryError:
        os._exit(EXIT_OUT_OF_MEMORY)
    except InvalidRequest as error:
        return ["refused", str(error.code), str(error)]
    except Exception as error:  # a bug of the library's
        reason = f"{type(error).__name__}: {error!s:.{MAX_REASON_CHARS}}"
        return ["refused", str(ErrorCode.INVALID_GRAMMAR), reason]
    return ["read", []]


def _receive(connection: socket.socket) -> Iterator[list[Any]]:
    unpacker = msgpack.Unpacker(max_buffer_size=0)  # unlimited: only the worker sends
    while received := connection.recv(1 << 20):
        unpacker.feed(received)
        yield from unpacker


def _limit_memory() -> None:
    """Limit this process to `MEMORY_BYTES` more than it uses now, on Linux, and forbid core files."""
    if sys.platform == "linux":
        pages_in_use = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages_in_use * resource.getpagesize() + MEMORY_BYTES
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard < 0 else min(limit, hard), hard))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would contain prompts


def _point_at_nothing(fileno: int) -> None:
    """Redirect a file descriptor to /dev/null."""
    nothing = os.open(os.devnull, os.O_RDWR)
    os.dup2(nothing, fileno)
    os.close(nothing)


if __name__ == "__main__":
    main()
