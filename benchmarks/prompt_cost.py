"""Measure the cost of reading prompts in the event loop: `python benchmarks/prompt_cost.py [--json FILE]`.

It prints three tables: tokenising the worst texts that are read in the loop, by tokenizer; all work of the
loop for the worst jobs of 1 MiB, until they are token ids or refused; and the normal, short prompt, in the
loop and through the process beside it. Times are processor time of the loop's thread, which other work on the
machine does not affect, and the best of several rounds.
"""

import argparse
import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgpack
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as CoreTokenizer

from benchmarks.machine import machine
from ingine.contract.jobs import DEFAULT_MAX_JOB_BYTES, decode_job
from ingine.engine.limits import RequestLimits
from ingine.engine.store.model_store import DEFAULT_MODEL, resolve_model
from ingine.engine.text.linear_time import LINEAR_PATTERNS
from ingine.engine.text.tokenizer import Tokenizer
from ingine.errors import InvalidRequest
from ingine.worker.prompts import INLINE_BYTES, PromptReader

NUM_ROUNDS = 5
NOW = datetime(2026, 1, 1, tzinfo=UTC)
QUESTION = "Write a short story about a lighthouse keeper who finds a letter in a bottle. "
CONTEXTS = (8192, 131_072)


def texts(num_bytes: int) -> Iterator[tuple[str, str]]:
    """Texts by name, each the worst case for one part of a tokenizer."""
    rng = random.Random(0)
    yield "English", QUESTION * (num_bytes // len(QUESTION) + 1)
    for name, text in [("digits", "1234567890"), ("spaces", " "), ("one letter", "a"), ("newlines", "\n")]:
        yield name, text * num_bytes
    yield "signs", "!?;." * num_bytes
    yield "letters", "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=num_bytes))
    yield (
        "any character",
        "".join(map(chr, rng.choices([*range(33, 0xD800), *range(0x10000, 0x20000)], k=num_bytes))),
    )
    yield "combining", "e\u0301\u0323" * num_bytes
    yield "special tokens", "<|im_start|>" * num_bytes


def cut(text: str, num_bytes: int) -> str:
    return text.encode()[:num_bytes].decode(errors="ignore")


def tokenizers() -> dict[str, Tokenizer]:
    """Tokenizers by name: the default model's, variants that cut text as other families do, and one of each
    other kind.
    """
    folder = resolve_model(DEFAULT_MODEL)
    found = {"SmolLM2": Tokenizer.from_folder(folder)}
    for number, pattern in enumerate(sorted(LINEAR_PATTERNS)):
        core = CoreTokenizer.from_file(str(folder / "tokenizer.json"))
        split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
        core.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(use_regex=False)])
        core.normalizer = normalizers.NFC()
        found[f"pattern {number}"] = Tokenizer(core)
    core = CoreTokenizer.from_file(str(folder / "tokenizer.json"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(use_regex=False)  # takes a whole text as one word
    found["one word"] = Tokenizer(core)
    pieces = [
        ("<unk>", 0.0),
        *((char * n, -n / 9) for char in " abcdefghijklmnopqrstuvwxyz1" for n in (1, 2, 4, 16)),
    ]
    core = CoreTokenizer(models.Unigram(pieces, 0, False))
    core.decoder = decoders.Metaspace()
    found["unigram"] = Tokenizer(core)
    return found


def thread_ms(function: Callable[[], object]) -> float:
    """Processor time of a call in ms, the best of several rounds."""
    best = float("inf")
    for _ in range(NUM_ROUNDS):
        began = time.thread_time()
        function()
        best = min(best, time.thread_time() - began)
    return best * 1000


def inline_table() -> list[dict]:
    rows = []
    for name, tokenizer in tokenizers().items():
        assert tokenizer.takes_linear_time, name
        cost = {}
        for kind, text in texts(INLINE_BYTES):
            text = cut(text, INLINE_BYTES)
            cost[kind] = thread_ms(partial(tokenizer.encode, text))
        rows.append({"tokenizer": name} | {kind: round(ms, 2) for kind, ms in cost.items()})
    return rows


@dataclass
class Host:
    """The part of an engine that a `PromptReader` uses."""

    tokenizer: Tokenizer
    limits: RequestLimits


def jobs(num_bytes: int) -> Iterator[tuple[str, bytes]]:
    num_bytes -= 100
    for kind, text in texts(num_bytes):
        yield kind, msgpack.packb({"id": "a", "prompt": cut(text, num_bytes)})
    content = "1" * (num_bytes - 40)
    yield "a chat of digits", msgpack.packb({"id": "a", "messages": [{"role": "user", "content": content}]})
    message = {"role": "u", "content": ""}
    yield "50,000 empty messages", msgpack.packb({"id": "a", "messages": [message] * 50_000})
    yield "4,096 messages", msgpack.packb({"id": "a", "messages": [message | {"content": "1" * 200}] * 4096})
    yield "token ids", msgpack.packb({"id": "a", "prompt": [1] * num_bytes})
    yield "131,000 token ids", msgpack.packb({"id": "a", "prompt": [30_000] * 131_000})
    yield "empty maps", msgpack.packb({"id": "a", "prompt": "x", "metadata": {"a": [{}] * num_bytes}})
    yield "nils", msgpack.packb({"id": "a", "prompt": "x", "metadata": {"a": [None] * num_bytes}})


async def read(reader: PromptReader, raw: bytes, max_num_tokens: int) -> str:
    try:
        job = decode_job(raw, max_num_tokens=max_num_tokens)
        token_ids, _ = await reader.read(job, NOW)
    except InvalidRequest as error:
        return str(error.code)
    return f"{len(token_ids)} tokens"


async def loop_table(tokenizer: Tokenizer) -> list[dict]:
    rows = []
    for context in CONTEXTS:
        reader = PromptReader(Host(tokenizer, RequestLimits(context, context, 49_152)), log_prompts=False)
        for kind, raw in jobs(DEFAULT_MAX_JOB_BYTES):
            best = best_wall = float("inf")
            for _ in range(3):
                began, began_wall = time.thread_time(), time.perf_counter()
                outcome = await read(reader, raw, context)
                best = min(best, time.thread_time() - began)
                best_wall = min(best_wall, time.perf_counter() - began_wall)
            rows.append({
                "context": context, "job": kind, "kB": len(raw) // 1000,
                "loop_ms": round(best * 1000, 1), "until_read_ms": round(best_wall * 1000, 1),
                "outcome": outcome,
            })  # fmt: skip
        await reader.close()
    return rows


async def short_table(tokenizer: Tokenizer, num_jobs: int = 256) -> list[dict]:
    reader = PromptReader(Host(tokenizer, RequestLimits(8192, 8192, 49_152)), log_prompts=False)
    rows = []
    for name, text in [("a question", QUESTION), ("a page", cut(QUESTION * 50, 3000))]:
        chat = [{"role": "user", "content": text}]
        for kind, prompt in [("text", {"prompt": text}), ("chat", {"messages": chat})]:
            job = decode_job(msgpack.packb({"id": "a", **prompt}))
            encode, given = (tokenizer.encode_chat, chat) if kind == "chat" else (tokenizer.encode, text)
            await reader.read(job, NOW)
            one, many, wall = [], [], []
            for _ in range(NUM_ROUNDS):
                began = time.perf_counter()
                await reader.read(job, NOW)
                one.append(time.perf_counter() - began)
                began, began_wall = time.thread_time(), time.perf_counter()
                await asyncio.gather(*(reader.read(job, NOW) for _ in range(num_jobs)))
                many.append((time.thread_time() - began) / num_jobs)
                wall.append((time.perf_counter() - began_wall) / num_jobs)
            rows.append({
                "prompt": f"{name}, {kind}", "bytes": len(text),
                "in_the_loop_ms": round(thread_ms(partial(encode, given)), 3),
                "loop_ms": round(min(many) * 1000, 3),
                "of_many_ms": round(min(wall) * 1000, 3), "alone_ms": round(min(one) * 1000, 3),
            })  # fmt: skip
    await reader.close()
    return rows


def show(title: str, rows: list[dict]) -> None:
    print(f"\n{title}")
    widths = {key: max(len(str(value)) for value in [key, *(row[key] for row in rows)]) for key in rows[0]}
    for row in [dict(zip(rows[0], rows[0], strict=True)), *rows]:
        print("  ".join(str(row[key]).rjust(width) for key, width in widths.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="Write the figures to this file too.")
    arguments = parser.parse_args()
    tokenizer = Tokenizer.from_folder(resolve_model(DEFAULT_MODEL))
    tables = {
        f"ms to tokenise {INLINE_BYTES} bytes, by kind of text": inline_table(),
        "jobs of up to a mebibyte: ms of the loop, and until they are read": asyncio.run(
            loop_table(tokenizer)
        ),
        "short prompts: ms a job in the loop as before, of the loop now, of wall time now": asyncio.run(
            short_table(tokenizer)
        ),
    }
    for title, rows in tables.items():
        show(title, rows)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine()} | tables, indent=1) + "\n")


if __name__ == "__main__":
    main()
