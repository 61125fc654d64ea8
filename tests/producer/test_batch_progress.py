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
