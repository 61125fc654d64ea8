"""The progress of a batch: counts of all runs, and the rate of lines that workers answer."""

import asyncio
import io
import re

import pytest
from rich.console import Console

from ingine.cli.batch_progress import PlainProgress, TerminalProgress
from ingine.contract.record import JobStatus
from ingine.producer import AsyncClient
from ingine.producer.batch import Batch
from ingine.producer.batch_input import InputFile
from tests.producer.fake_worker import FakeWorker
from tests.producer.test_batch import Files, request, serving
from tests.waiting import wait_until_async


@pytest.fixture
def files(tmp_path) -> Files:
    return Files(tmp_path)


@pytest.fixture(autouse=True)
def talkative(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ingine.cli.batch_progress.REPORT_EVERY_S", 0.0)


async def fail(worker: FakeWorker, job) -> None:
    await worker.end(job.id, 0, JobStatus.FAILED, error={"code": "prompt_too_long", "message": "too long"})


@pytest.mark.parametrize("kind", [PlainProgress, TerminalProgress])
async def test_a_resumed_run_counts_earlier_failures_too(
    client: AsyncClient, worker: FakeWorker, files: Files, kind
):
    files.write(request(0), "not json")
    said = io.StringIO()

    async def run() -> None:
        progress = kind(Console(file=said, force_terminal=kind is TerminalProgress, width=120))
        batch = Batch(
            client, InputFile(files.input), files.output, files.errors, progress=progress, window=256
        )
        try:
            async with serving(worker, fail):
                await batch.run()
        finally:
            progress.stop()

    await run()
    assert "2 failed" in said.getvalue()
    files.write(request(0), "not json", request(1))
    said.truncate(0)
    worker._stopped = False
    await run()
    text = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", said.getvalue())
    assert "3 failed" in text
    assert "1 failed" not in text
    if kind is PlainProgress:
        assert "3 lines, 2 done by an earlier run, 2 of them failed" in text


async def test_lines_that_are_refused_at_once_say_nothing_of_the_others(client: AsyncClient, files: Files):
    """A batch of one refused line and ten good ones once had an ETA of a second without any worker."""
    files.write("not json", *(request(n) for n in range(10)))
    said = io.StringIO()
    progress = PlainProgress(Console(file=said, width=120))
    batch = asyncio.create_task(
        Batch(client, InputFile(files.input), files.output, files.errors, progress=progress, window=256).run()
    )
    await wait_until_async(lambda: "1/11 done" in said.getvalue(), what="the first report")
    assert "batch: 1/11 done, 1 failed, 0.0 lines/s, ETA unknown\n" in said.getvalue()
    batch.cancel()
    await asyncio.wait([batch])


@pytest.mark.parametrize("kind", [PlainProgress, TerminalProgress])
def test_the_share_of_cached_prompt_tokens(kind):
    said = io.StringIO()
    progress = kind(Console(file=said, force_terminal=kind is TerminalProgress, width=120))
    progress.start(4, 0, 0)
    progress.advance(failed=True, ran=False)
    assert "cached" not in said.getvalue()
    progress.advance(failed=False, ran=True, num_prompt_tokens=30, num_cached_tokens=16)
    progress.advance(failed=False, ran=True, num_prompt_tokens=10, num_cached_tokens=0)
    progress.stop()
    assert "40% of prompt tokens cached, ETA 0:00:0" in said.getvalue()


async def test_the_share_comes_from_the_results(client: AsyncClient, worker: FakeWorker, files: Files):
    async def answer(worker: FakeWorker, job) -> None:
        usage = {"num_prompt_tokens": 20, "num_cached_tokens": 16, "num_output_tokens": 0}
        await worker.end(job.id, 0, usage=usage)

    files.write(request(0), request(1))
    said = io.StringIO()
    progress = PlainProgress(Console(file=said, width=120))
    async with serving(worker, answer):
        await Batch(
            client, InputFile(files.input), files.output, files.errors, progress=progress, window=256
        ).run()
    assert "2/2 done, 0 failed" in said.getvalue()
    assert "80% of prompt tokens cached" in said.getvalue()


def test_the_last_report_of_a_run_is_its_end(monkeypatch: pytest.MonkeyPatch):
    """A run that ends before its first report says what it has done, a run that did nothing does not."""
    monkeypatch.setattr("ingine.cli.batch_progress.REPORT_EVERY_S", 1e9)
    said = io.StringIO()
    progress = PlainProgress(Console(file=said, width=120))
    progress.stop()
    progress.start(2, 1, 0)
    progress.stop()
    assert said.getvalue() == "batch: 2 lines, 1 done by an earlier run, 0 of them failed\n"
    progress.advance(failed=False, ran=True)
    progress.stop()
    assert "batch: 2/2 done, 0 failed" in said.getvalue()
