"""Jobs whose workers get `kill -9`, and what their consumers receive of them."""

import signal
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

from ingine.contract.events import decode_log
from ingine.contract.jobs import Job
from ingine.contract.keys import Keys
from ingine.engine.engine import Engine
from ingine.engine.message_format import MessageFormat
from ingine.engine.outputs import SeqOutput
from ingine.engine.parsers.message_parser import functions_of, parser_of
from ingine.engine.parsers.reasoning import REASONING_TAGS
from ingine.engine.request import EngineRequest
from ingine.message import MessageAssembly, MessageDelta
from ingine.producer import AsyncClient, AsyncJobHandle, Chunk, Result
from tests.chaos.reference import prompt_of
from tests.chaos.snapshot import Log
from tests.chaos.zygote import Zygote
from tests.waiting import wait_until_async

LEASE_S = 0.5
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}} for name in ("f", "g")
]
FORMAT = MessageFormat("hermes", functions_of(TOOLS), reasoning=REASONING_TAGS["think"])
"""How the outputs of chats are read."""


@dataclass
class Output:
    """One choice of a job, as a consumer puts it together."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)
    message: dict[str, Any] | None = None

    def add(self, token_ids: list[int], text: str, logprobs: list[dict[str, Any]] | None) -> None:
        self.token_ids += token_ids
        self.text += text
        self.logprobs += logprobs or ()


@dataclass
class Uninterrupted:
    """What a job generates that is never interrupted."""

    outputs: dict[int, Output]
    """Without the messages, since the ids of their calls depend on the job's."""
    marked_texts: list[str]
    """The text of each choice with that of special tokens, of which its message is made."""
    finish_reasons: list[str]
    stop_reasons: list[int | str | None]
    prompt_logprobs: list[dict[str, Any] | None] | None

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest choice."""
        return max(len(output.token_ids) for output in self.outputs.values())


def uninterrupted(engine: Engine, job: dict[str, Any]) -> Uninterrupted:
    """Generate each choice of a job by a lone request of its own. job: arguments of `submit`."""
    job = Job(id="one", **job)
    made = Uninterrupted({}, [], [], [], None)
    for index in range(job.sampling.n):
        more = {"n": 1, "seed": (job.sampling.seed or 0) + index}
        params = job.sampling.model_copy(update=more)
        output, last = _generate(engine, EngineRequest("one", prompt_of(engine, job), params), made)
        made.outputs[index] = output
        made.finish_reasons.append(str(last.finish_reason))
        made.stop_reasons.append(last.stop_reason)
        params = params.model_copy(update={"skip_special_tokens": False, "prompt_logprobs": None})
        marked, _ = _generate(engine, EngineRequest("one", prompt_of(engine, job), params), made)
        made.marked_texts.append(marked.text)
    return made


def _generate(engine: Engine, request: EngineRequest, made: Uninterrupted) -> tuple[Output, SeqOutput]:
    engine.add(request)
    output = Output()
    while engine.has_unfinished:
        for step in engine.step():
            output.add(step.token_ids, step.text + step.final_text, step.logprobs)
            made.prompt_logprobs = made.prompt_logprobs or step.prompt_logprobs
    return output, step


@dataclass
class Received:
    """What the consumers of a job have received."""

    result: Result
    streams: dict[str, dict[int, Output]]
    """The choices by consumer."""
    prompt_logprobs: list[Any]
    """All that the late stream has received."""


class Killing:
    """Starts workers that die at a given call, and follows the jobs that they run."""

    def __init__(self, zygote: Zygote, ended: dict[str, int], url: str, model: Path):
        """ended: exit statuses by name, which the zygote's callback fills."""
        self.zygote, self.ended = zygote, ended
        self._url, self._model = url, model

    async def worker(self, queue: str, name: str, *, fate: dict[str, Any], **settings: Any) -> str:
        """Start a worker. Returns the name of its process."""
        process = f"{queue}-{name}"
        given = {
            "queue": queue, "redis_url": self._url, "model": str(self._model), "dtype": "float32",
            "device": "cpu", "http_port": -1, "lease_s": LEASE_S, "max_num_seqs": 8, "worker_id": name,
            "tool_parser": FORMAT.tool_format, "reasoning_parser": "think",
        }  # fmt: skip
        await self.zygote.spawn(process, "worker", settings=given | settings, fate=fate)
        return process

    def client(self, queue: str) -> AsyncClient:
        return AsyncClient(self._url, queue=queue)

    async def ended_first(self, process: str, job: AsyncJobHandle) -> bool:
        """Wait until a process or a job has ended. Returns whether the process had ended by then."""

        async def is_over() -> bool:
            return process in self.ended or (await job.status()).status.terminal

        await wait_until_async(is_over, what="the end of a worker or of its job")
        return process in self.ended

    def end(self, *processes: str) -> None:
        for process in processes:
            self.zygote.signal(process, signal.SIGKILL)

    async def log(self, queue: str, job_id: str) -> Log:
        """The job's log. Raises if it has a gap, a repeat, or tokens behind an end."""
        async with redis.asyncio.Redis.from_url(self._url) as connection:
            entries = await connection.xrange(Keys(queue).tokens(job_id))
        events = decode_log(job_id, 0, entries)
        *_, end = events
        ids = (entry_id.decode() for entry_id, _ in entries)
        return Log(status=str(end.status), entries=list(zip(ids, events, strict=True)))


async def received(job: AsyncJobHandle, early: dict[str, dict[int, Output]], timeout_s: float) -> Received:
    """early: what was streamed while the job ran."""
    result = await job.result(timeout_s)
    late = [chunk async for chunk in job.stream(0)]
    found = [chunk.prompt_logprobs for chunk in late if chunk.prompt_logprobs is not None]
    return Received(result, early | {"late": joined(late)}, found)


def joined(chunks: list[Chunk]) -> dict[int, Output]:
    outputs: dict[int, Output] = defaultdict(Output)
    messages: dict[int, MessageAssembly] = defaultdict(MessageAssembly)
    for chunk in chunks:
        outputs[chunk.index].add(chunk.token_ids, chunk.text, chunk.logprobs)
        messages[chunk.index].add(MessageDelta.from_openai(chunk.delta))
    for index, output in outputs.items():
        output.message = messages[index].message().to_openai()
    return dict(sorted(outputs.items()))


async def stream(job: AsyncJobHandle) -> dict[int, Output]:
    """Follow a job to its end in one stream."""
    return joined([chunk async for chunk in job.stream(0)])


async def stream_in_parts(job: AsyncJobHandle, num_chunks: int = 2) -> dict[int, Output]:
    """Follow a job to its end, in streams of `num_chunks` chunks with tokens, each after the one before."""
    chunks: list[Chunk] = []
    while part := [chunk async for chunk in _first(job, chunks[-1].position if chunks else 0, num_chunks)]:
        chunks += part
        if not part[-1].token_ids:  # the text that was held back until the end
            break
    return joined(chunks)


async def _first(job: AsyncJobHandle, position: int, number: int) -> AsyncIterator[Chunk]:
    async with aclosing(job.stream(position)) as chunks:
        async for chunk in chunks:
            yield chunk
            number -= 1
            if not number:
                return


def assert_uninterrupted(received: Received, expected: Uninterrupted, *, is_chat: bool, what: str) -> None:
    result = received.result
    choices = {
        each.index: Output(each.token_ids, each.text, each.logprobs or [], each.message)
        for each in result.choices
    }
    right, reasons = {}, []
    for index, output in expected.outputs.items():
        message, reason = {"role": "assistant", "content": output.text}, expected.finish_reasons[index]
        if is_chat:
            message, reason = _read(result.job_id, index, expected.marked_texts[index], reason)
        right[index] = replace(output, message=message)
        reasons.append(reason)
    for name, outputs in (received.streams | {"result": choices}).items():
        assert _plain(outputs) == _plain(right, about=True), f"{name}, {what}"
    assert [each.finish_reason for each in result.choices] == reasons, what
    assert [each.stop_reason for each in result.choices] == expected.stop_reasons, what
    num_tokens = sum(len(output.token_ids) for output in expected.outputs.values())
    assert result.usage["num_output_tokens"] == num_tokens, what
    wanted = [] if expected.prompt_logprobs is None else [_entries(expected.prompt_logprobs, about=True)]
    assert [_entries(each) for each in received.prompt_logprobs] == wanted, what


def _read(job_id: str, index: int, text: str, reason: str) -> tuple[dict[str, Any], str]:
    """The message of a choice, and its finish reason: of its whole text at once."""
    parser = parser_of(replace(FORMAT, key=job_id), index)
    parser.feed(text)
    parser.flush()
    return parser.message().to_openai(), parser.finish_reason(reason)


def _plain(outputs: dict[int, Output], *, about: bool = False) -> dict[int, tuple]:
    return {
        index: (output.token_ids, output.text, output.message, _entries(output.logprobs, about=about))
        for index, output in outputs.items()
    }


def _entries(logprobs: list[dict[str, Any] | None], *, about: bool = False) -> list[Any]:
    """Each token, its text and its log probability. about: those of two batches may differ in the last bits,
    which other tests exclude where the kernels do."""
    number = partial(pytest.approx, abs=1e-4) if about else float
    return [each and (each["token_id"], each["bytes"], number(each["logprob"])) for each in logprobs]
