"""Options of a batch: to retry, to keep the order."""

import asyncio
from pathlib import Path

import pytest

from ingine.contract.jobs import Job
from ingine.contract.keys import Keys
from ingine.contract.record import JobStatus
from ingine.producer import AsyncClient, ConfigError
from ingine.producer.batch import BatchSummary
from tests.producer.conftest import Server
from tests.producer.fake_worker import FakeWorker
from tests.producer.test_batch import Command, Files, answer, batch_command, num_rows, request, run, serving
from tests.waiting import wait_until_async


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def command(files: Files, valkey: Server, queue: str) -> Command:
    return batch_command(files, valkey, queue)


async def test_retry_errors_runs_the_lines_of_the_error_file_again(
    client: AsyncClient, worker: FakeWorker, files: Files
):
    files.write(request(0), request(1, prompt="fail"), "not json", request(2, prompt="fail"))
    mended = False

    async def answer_or_fail(worker: FakeWorker, job: Job) -> None:
        await (worker.end(job.id, 0) if mended else answer(worker, job))

    async with serving(worker, answer_or_fail) as jobs:
        await run(client, files)
        again = await run(client, files, retry_errors=True)
        assert again == BatchSummary(num_lines=4, num_failed=3, num_resumed=1, num_cut=1)
        assert files.ids() == (["line-000"], ["None", "line-001", "line-002"])
        mended = True
        mostly = await run(client, files, retry_errors=True)
    assert mostly == BatchSummary(num_lines=4, num_failed=1, num_resumed=1, num_cut=3)
    assert files.ids() == (["line-000", "line-001", "line-002"], ["None"])
    assert [job.prompt for job in jobs].count("fail") == 6


async def test_rows_of_another_batch_are_not_emptied(client: AsyncClient, worker: FakeWorker, files: Files):
    files.write("not json")
    await run(client, files)
    before = files.rows()
    files.write("not JSON either")
    with pytest.raises(ConfigError, match="answers no line"):
        await run(client, files, retry_errors=True)
    assert files.rows() == before


async def test_a_retry_that_is_killed_is_resumed_without_the_option(
    command: Command, valkey: Server, keys: Keys, files: Files
):
    files.write(*(request(n, prompt=f"prompt {n}") for n in range(8)))
    may_answer, mended = asyncio.Semaphore(8), False

    async def fail_until_mended(worker: FakeWorker, job: Job) -> None:
        await may_answer.acquire()
        if mended:
            await worker.end(job.id, 0)
        else:
            await worker.end(job.id, 0, JobStatus.FAILED, error={"code": "engine_error", "message": "no"})

    async with valkey.connect() as redis, serving(FakeWorker(redis, keys), fail_until_mended) as jobs:
        assert (await command.run())[0] == 1
        assert num_rows(files.errors) == 8
        mended = True
        retry = await Command([*command.arguments, "--retry-errors"]).start()
        for _ in range(3):
            may_answer.release()
        await wait_until_async(lambda: num_rows(files.output) == 3)
        retry.kill()
        await retry.communicate()
        for _ in range(5):
            may_answer.release()
        exit_status, _, stderr = await command.run()
    assert exit_status == 0, stderr
    assert files.ids() == ([f"line-{n:03}" for n in range(8)], [])
    assert len(jobs) == 16


async def test_ordered_rows_are_in_the_order_of_the_input(
    client: AsyncClient, worker: FakeWorker, files: Files
):
    """The worker answers the jobs that it can have backwards."""
    window = 5
    lines = [request(n, prompt="fail" if n % 7 == 3 else f"prompt {n}") for n in range(20)]
    files.write(*lines[:8], "not json", *lines[8:])
    held: list[Job] = []

    async def answer_backwards(worker: FakeWorker, job: Job) -> None:
        held.append(job)
        num_submitted = await worker.redis.xlen(worker.keys.jobs("low"))  # and not answered
        if len(held) in (num_submitted, window - 1):
            while held:
                await answer(worker, held.pop())

    async with serving(worker, answer_backwards):
        summary = await run(client, files, window=window, ordered=True)
    assert (summary.num_lines, summary.num_failed) == (21, 4)
    output, errors = files.rows()
    ids = [row["custom_id"] for row in output]
    assert ids == sorted(ids)
    assert [row["custom_id"] for row in errors] == ["line-003", None, "line-010", "line-017"]


async def test_ordered_lines_wait_within_the_window(client: AsyncClient, worker: FakeWorker, files: Files):
    """No result is kept beyond the window, however many could be had while the first line takes its time."""
    files.write(*(request(n) for n in range(20)))
    others_answered = asyncio.Event()

    async def answer_the_first_last(worker: FakeWorker, job: Job) -> None:
        if job.prompt == "prompt 0":
            tasks.append(asyncio.create_task(answer_later(worker, job)))
        else:
            await answer(worker, job)
        if len(jobs) == 4:
            others_answered.set()

    async def answer_later(worker: FakeWorker, job: Job) -> None:
        await others_answered.wait()
        num_jobs_before.append(len(jobs))
        assert num_rows(files.output) == 0
        await answer(worker, job)

    tasks: list[asyncio.Task] = []
    num_jobs_before: list[int] = []
    async with serving(worker, answer_the_first_last) as jobs:
        await run(client, files, window=4, ordered=True)
    await asyncio.gather(*tasks)
    assert num_jobs_before == [4]
    assert [row["custom_id"] for row in files.rows()[0]] == [f"line-{n:03}" for n in range(20)]


async def test_an_ordered_run_that_was_killed_is_resumed_in_order(
    command: Command, valkey: Server, keys: Keys, files: Files
):
    files.write(*(request(n) for n in range(30)))
    command.arguments.append("--ordered")
    may_answer = asyncio.Semaphore(12)

    async def answer_when_allowed(worker: FakeWorker, job: Job) -> None:
        await may_answer.acquire()
        await answer(worker, job)

    async with valkey.connect() as redis, serving(FakeWorker(redis, keys), answer_when_allowed) as jobs:
        process = await command.start()
        await wait_until_async(lambda: num_rows(files.output) >= 5)
        process.kill()
        await process.communicate()
        for _ in range(30):
            may_answer.release()
        exit_status, _, stderr = await command.run()
    assert exit_status == 0, stderr
    assert [row["custom_id"] for row in files.rows()[0]] == [f"line-{n:03}" for n in range(30)]
    assert len(jobs) == 30


async def test_retried_lines_have_no_order(client: AsyncClient, files: Files):
    files.write(request(0))
    with pytest.raises(ConfigError, match="retried in order"):
        await run(client, files, retry_errors=True, ordered=True)
