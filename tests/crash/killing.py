"""Jobs whose workers get `kill -9`, and what their consumers receive of them."""

import signal
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis.asyncio

from ingine.contract.events import decode_log
from ingine.contract.keys import Keys
from ingine.contract.record import JobStatus
from ingine.engine.engine import Engine
from ingine.engine.request import EngineRequest
from ingine.producer import AsyncClient, AsyncJobHandle, Chunk, Result
from ingine.sampling_params import SamplingParams
from tests.chaos.zygote import Zygote
from tests.waiting import wait_until_async

LEASE_S = 0.5


@dataclass
class Output:
    """One choice of a job, as a consumer puts it together."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, token_ids: list[int], text: str, logprobs: list[dict[str, Any]] | None) -> None:
        self.token_ids += token_ids
        self.text += text
        self.logprobs += logprobs or ()


@dataclass
class Uninterrupted:
    """What a job generates that is never interrupted."""

    outputs: dict[int, Output]
    finish_reasons: list[str]
    stop_reasons: list[int | str | None]
    prompt_logprobs: list[dict[str, Any] | None] | None

    @property
    def num_tokens(self) -> int:
        """Tokens of the longest choice."""
        return max(len(output.token_ids) for output in self.outputs.values())


def uninterrupted(engine: Engine, prompt: str, sampling: dict[str, Any]) -> Uninterrupted:
    """Generate each choice of a job by a lone request of its own."""
    made = Uninterrupted({}, [], [], None)
    for index in range(sampling.get("n", 1)):
        params = SamplingParams(**sampling | {"n": 1, "seed": sampling.get("seed", 0) + index})
        engine.add(EngineRequest("one", engine.tokenizer.encode(prompt), params))
        output = made.outputs[index] = Output()
        while engine.has_unfinished:
            for step in engine.step():
                output.add(step.token_ids, step.text + step.final_text, step.logprobs)
                made.prompt_logprobs = made.prompt_logprobs or step.prompt_logprobs
        made.finish_reasons.append(str(step.finish_reason))
        made.stop_reasons.append(step.stop_reason)
    return made


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

    async def check_log(self, queue: str, job_id: str) -> None:
        """Raise if the job's log has a gap, a repeat, or tokens behind an end."""
        async with redis.asyncio.Redis.from_url(self._url) as connection:
            entries = await connection.xrange(Keys(queue).tokens(job_id))
        *_, end = decode_log(job_id, 0, entries)
        assert end.status is JobStatus.FINISHED


async def received(job: AsyncJobHandle, early: dict[str, dict[int, Output]], timeout_s: float) -> Received:
    """early: what was streamed while the job ran."""
    result = await job.result(timeout_s)
    late = [chunk async for chunk in job.stream(0)]
    found = [chunk.prompt_logprobs for chunk in late if chunk.prompt_logprobs is not None]
    return Received(result, early | {"late": joined(late)}, found)


def joined(chunks: list[Chunk]) -> dict[int, Output]:
    outputs: dict[int, Output] = defaultdict(Output)
    for chunk in chunks:
        outputs[chunk.index].add(chunk.token_ids, chunk.text, chunk.logprobs)
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


def assert_uninterrupted(received: Received, expected: Uninterrupted, what: str) -> None:
    result = received.result
    choices = {each.index: Output(each.token_ids, each.text, each.logprobs or []) for each in result.choices}
    for name, outputs in (received.streams | {"result": choices}).items():
        assert _plain(outputs) == _plain(expected.outputs, about=True), f"{name}, {what}"
    assert [each.finish_reason for each in result.choices] == expected.finish_reasons, what
    assert [each.stop_reason for each in result.choices] == expected.stop_reasons, what
    num_tokens = sum(len(output.token_ids) for output in expected.outputs.values())
    assert result.usage["num_output_tokens"] == num_tokens, what
    wanted = [] if expected.prompt_logprobs is None else [_entries(expected.prompt_logprobs, about=True)]
    assert [_entries(each) for each in received.prompt_logprobs] == wanted, what


def _plain(outputs: dict[int, Output], *, about: bool = False) -> dict[int, tuple]:
    return {
        index: (output.token_ids, output.text, _entries(output.logprobs, about=about))
        for index, output in outputs.items()
    }


def _entries(logprobs: list[dict[str, Any] | None], *, about: bool = False) -> list[Any]:
    """Each token, its text and its log probability. about: those of two batches may differ in the last bits,
    which other tests exclude where the kernels do."""
    number = partial(pytest.approx, abs=1e-4) if about else float
    return [each and (each["token_id"], each["bytes"], number(each["logprob"])) for each in logprobs]
