"""Batches: every line gets a row, whatever happens to the run."""

import asyncio
import json
import resource
import shlex
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from redis.asyncio import Redis

from ingine.contract.jobs import Job
from ingine.contract.keys import EVENT_FIELD, Keys, log_id
from ingine.contract.record import JobStatus
from ingine.producer import AsyncClient, ConfigError
from ingine.producer.batch import Batch, BatchSummary
from ingine.producer.batch_files import RowFile, WriteFailed
from ingine.producer.batch_input import InputFile
from tests.producer.conftest import Server
from tests.producer.fake_worker import FakeWorker
from tests.waiting import wait_until_async


class Quiet:
    def start(self, total: int, num_done: int, num_failed: int) -> None:
        pass

    def advance(self, **counts: int) -> None:
        pass


class Files:
    def __init__(self, folder: Path):
        self.input, self.output, self.errors = (
            folder / name for name in ("in.jsonl", "out.jsonl", "err.jsonl")
        )

    def write(self, *lines: str | dict) -> None:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        self.input.write_text("".join(f"{text}\n" for text in texts))

    def rows(self) -> tuple[list[dict], list[dict]]:
        output, errors = (path.read_text().splitlines() for path in (self.output, self.errors))
        return [json.loads(line) for line in output], [json.loads(line) for line in errors]

    def ids(self) -> tuple[list[str], list[str]]:
        output, errors = self.rows()
        return sorted(row["custom_id"] for row in output), sorted(str(row["custom_id"]) for row in errors)


def request(number: int, **body) -> dict:
    body = {"model": "m", "prompt": f"prompt {number}", "max_tokens": 2} | body
    return {"custom_id": f"line-{number:03}", "method": "POST", "url": "/v1/completions", "body": body}


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


async def answer(worker: FakeWorker, job: Job) -> None:
    """Answer with two tokens that echo the prompt. The prompt `fail` fails."""
    if job.prompt == "fail":
        error = {"code": "prompt_too_long", "message": "too long"}
        await worker.end(job.id, 0, JobStatus.FAILED, error=error)
    else:
        await worker.commit(job.id, 0, 2, publish=job.stream)
        await worker.end(job.id, 2, text=f" {job.prompt}")


@asynccontextmanager
async def serving(worker: FakeWorker, how=answer) -> AsyncIterator[list[Job]]:
    """Run a worker, and yield the list of jobs that it takes."""
    jobs: list[Job] = []

    async def note(worker: FakeWorker, job: Job) -> None:
        jobs.append(job)
        await how(worker, job)

    async with asyncio.TaskGroup() as group:
        group.create_task(worker.serve(note))
        try:
            yield jobs
        finally:  # even if the test has failed
            worker.stop()


async def run(
    client: AsyncClient, files: Files, *, window: int = 256, model: str | None = None, **options
) -> BatchSummary:
    input_file = InputFile(files.input, model=model)
    paths = (files.output, files.errors)
    batch = Batch(client, input_file, *paths, progress=Quiet(), window=window, **options)
    return await batch.run()


async def test_every_line_ends_in_one_of_the_files(client: AsyncClient, worker: FakeWorker, files: Files):
    good = [request(n) for n in range(20)]
    files.write(
        *good,
        "not json",
        "",
        request(3),
        request(20, prompt="fail"),
        request(21, best_of=2),
        request(22, top_p=7),
    )
    async with serving(worker) as jobs:
        summary = await run(client, files, window=4)
    assert summary == BatchSummary(num_lines=25, num_failed=5, num_resumed=0, num_cut=20)
    output, errors = files.ids()
    assert output == [f"line-{n:03}" for n in range(20)]
    assert errors == ["None", "line-003", "line-020", "line-021", "line-022"]
    [row] = [row for row in files.rows()[0] if row["custom_id"] == "line-007"]
    assert row["response"]["body"]["choices"][0]["text"] == "<1><2> prompt 7"
    assert {(job.priority, job.stream) for job in jobs} == {("low", False)}


async def test_no_more_are_in_flight_than_the_window(
    client: AsyncClient, worker: FakeWorker, files: Files, redis: Redis, keys: Keys
):
    files.write(*(request(n) for n in range(12)))
    depths: list[int] = []

    async def answer_and_look(worker: FakeWorker, job: Job) -> None:
        depths.append(await redis.xlen(keys.jobs("low")))
        await answer(worker, job)

    async with serving(worker, answer_and_look):
        await run(client, files, window=3)
    assert max(depths) <= 3
    assert len(files.rows()[0]) == 12


@pytest.mark.parametrize("limits", [{"max_jobs": 1}, {"max_jobs_per_s": 2}], ids=str)
async def test_a_queue_that_takes_no_more_is_waited_for(
    client: AsyncClient, worker: FakeWorker, files: Files, limits: dict
):
    await client.set_limits(**limits)
    files.write(*(request(n) for n in range(4)))
    async with serving(worker):
        assert (await run(client, files)).num_failed == 0
    assert len(files.rows()[0]) == 4


async def test_running_again_runs_nothing_again(client: AsyncClient, worker: FakeWorker, files: Files):
    files.write(request(0), request(1, prompt="fail"), "not json")
    async with serving(worker):
        await run(client, files)
    before = files.rows()
    assert await run(client, files) == BatchSummary(num_lines=3, num_failed=2, num_resumed=3, num_cut=1)
    assert files.rows() == before


async def test_what_an_interrupted_run_has_submitted_is_not_paid_for_twice(
    client: AsyncClient, worker: FakeWorker, files: Files, redis: Redis, keys: Keys
):
    files.write(*(request(n) for n in range(5)))
    interrupted = asyncio.create_task(run(client, files))

    async def all_submitted() -> bool:
        return await redis.xlen(keys.jobs("low")) == 5

    await wait_until_async(all_submitted)
    interrupted.cancel()
    with pytest.raises(asyncio.CancelledError):
        await interrupted
    async with serving(worker) as jobs:
        await run(client, files)
    assert len(jobs) == 5
    assert files.ids() == ([f"line-{n:03}" for n in range(5)], [])


async def test_failed_lines_run_again_once_the_error_file_is_gone(
    client: AsyncClient, worker: FakeWorker, files: Files
):
    files.write(request(0), request(1, prompt="fail"))
    mended = False

    async def answer_or_fail(worker: FakeWorker, job: Job) -> None:
        await (worker.end(job.id, 0) if mended else answer(worker, job))

    async with serving(worker, answer_or_fail) as jobs:
        await run(client, files)
        files.errors.unlink()
        mended = True
        assert (await run(client, files)).num_failed == 0
    assert sorted(job.prompt for job in jobs) == ["fail", "fail", "prompt 0"]
    assert files.ids() == (["line-000", "line-001"], [])


async def test_a_line_whose_log_was_damaged_runs_again_once_the_error_file_is_gone(
    client: AsyncClient, worker: FakeWorker, files: Files, redis: Redis, keys: Keys
):
    files.write(request(0))

    async def damage_and_answer(worker: FakeWorker, job: Job) -> None:
        if len(jobs) == 1:
            await redis.xadd(keys.tokens(job.id), {EVENT_FIELD: b"\xc1"}, id=log_id(1))
        await worker.end(job.id, 1 if len(jobs) == 1 else 0)

    async with serving(worker, damage_and_answer) as jobs:
        assert (await run(client, files)).num_failed == 1
        assert files.rows()[1][0]["response"]["body"]["error"]["code"] == "bad_record"
        files.errors.unlink()
        assert (await run(client, files)).num_failed == 0
    assert [job.prompt for job in jobs] == ["prompt 0"] * 2
    assert files.ids() == (["line-000"], [])


async def test_a_torn_last_line_is_mended(client: AsyncClient, worker: FakeWorker, files: Files):
    files.write(*(request(n) for n in range(3)))
    async with serving(worker):
        await run(client, files)
        whole = files.output.read_bytes()
        files.output.write_bytes(whole[:-10])
        assert (await run(client, files)).num_resumed == 2
    assert files.ids() == (["line-000", "line-001", "line-002"], [])


async def test_rows_that_answer_another_input_are_not_mixed_with_ours(
    client: AsyncClient, worker: FakeWorker, files: Files
):
    files.write(request(0), request(1))
    async with serving(worker):
        await run(client, files)
    files.write(request(0), request(1, max_tokens=3))
    with pytest.raises(ConfigError, match="'line-001' that answers no line"):
        await run(client, files)
    files.write(request(0), request(1))
    with pytest.raises(ConfigError, match="--model"):
        await run(client, files, model="another")


async def test_files_that_cannot_be_used(client: AsyncClient, files: Files):
    with pytest.raises(ConfigError, match=r"in.jsonl is not a file"):
        await run(client, files)
    files.write(request(0))
    files.output.write_text('{"some": "other file"}\n')
    with pytest.raises(ConfigError, match=r"out.jsonl, line 1: not a row"):
        await run(client, files)
    files.output = files.input
    with pytest.raises(ConfigError, match="three different files"):
        await run(client, files)
    files.output = files.input.parent / "missing" / "out.jsonl"
    with pytest.raises(ConfigError, match=r"cannot write .*missing"):
        await run(client, files)


@pytest.mark.parametrize(
    "line",
    [
        b"[" * 100_000,
        b'{"id": {}, "custom_id": "a"}',
        b'{"id": [], "custom_id": "a"}',
        b'["id", "custom_id"]',
    ],
    ids=["nested", "map as id", "list as id", "list"],
)
def test_a_line_that_is_no_row_is_named_by_its_number(tmp_path: Path, line: bytes):
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"id": "1", "custom_id": "a"}\n' + line + b"\n")
    with RowFile(path) as file, pytest.raises(ConfigError, match=r"out.jsonl, line 2: not a row"):
        for row in file.rows():
            assert {row["id"]}


def test_a_row_file_belongs_to_one_run(tmp_path: Path):
    with RowFile(tmp_path / "out.jsonl"), pytest.raises(ConfigError, match="another run"):
        RowFile(tmp_path / "out.jsonl")
    RowFile(tmp_path / "out.jsonl").close()


def test_a_torn_line_longer_than_any_buffer_is_cut_off(tmp_path: Path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(b'{"id": "1", "custom_id": "a"}\n' + b"x" * 200_000)
    with RowFile(path) as file:
        assert [row["id"] for row in file.rows()] == ["1"]
    path.write_bytes(b"x" * 200_000)
    with RowFile(path):
        assert path.read_bytes() == b""


def test_a_row_that_does_not_fit_leaves_nothing_behind(tmp_path: Path):
    """A limit on the file's size simulates a full disk: the write is cut short, then refused."""
    path = tmp_path / "out.jsonl"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with RowFile(path) as file:
        file.write({"id": "fits", "custom_id": "a"})
        size = path.stat().st_size
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, hard))
        try:
            with pytest.raises(WriteFailed, match="run the same command again"):
                file.write({"id": "does not", "custom_id": "b" * 100})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert path.stat().st_size == size
        file.write({"id": "fits again", "custom_id": "b"})
        assert [row["id"] for row in file.rows()] == ["fits", "fits again"]


# ----------------------------------------------------------------- the command, as a process of its own


@dataclass
class Command:
    """A process that runs `ingine batch`."""

    arguments: list[str]

    async def start(self) -> asyncio.subprocess.Process:
        pipe = asyncio.subprocess.PIPE
        return await asyncio.create_subprocess_exec(*self.arguments, stdout=pipe, stderr=pipe)

    async def run(self) -> tuple[int, str, str]:
        """Run to the end. Returns exit status, standard output and standard error."""
        process = await self.start()
        stdout, stderr = await process.communicate()
        return process.returncode, stdout.decode(), stderr.decode()


def batch_command(files: Files, valkey: Server, queue: str) -> Command:
    paths = [str(files.input), "-o", str(files.output), "--errors", str(files.errors)]
    where = ["--redis-url", valkey.url, "--queue", queue]
    return Command([sys.executable, "-m", "ingine.cli.main", "batch", *paths, *where, "--window", "8"])


@pytest.fixture
def command(files: Files, valkey: Server, queue: str) -> Command:
    return batch_command(files, valkey, queue)


def num_rows(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


async def test_a_run_that_is_killed_again_and_again_ends_with_every_line_once(
    command: Command, valkey: Server, keys: Keys, files: Files
):
    num_lines = 60
    files.write(*(request(n) for n in range(num_lines)))
    may_answer = asyncio.Semaphore(0)

    async def answer_when_allowed(worker: FakeWorker, job: Job) -> None:
        await may_answer.acquire()
        await answer(worker, job)

    async with valkey.connect() as redis, serving(FakeWorker(redis, keys), answer_when_allowed) as jobs:
        for num_allowed in (10, 15, 15):
            process = await command.start()
            allowed_until = num_rows(files.output) + num_allowed
            for _ in range(num_allowed):
                may_answer.release()
            await wait_until_async(lambda least=allowed_until: num_rows(files.output) >= least - 5)
            process.kill()
            assert await process.wait() == -signal.SIGKILL
        for _ in range(num_lines):
            may_answer.release()
        exit_status, _, stderr = await command.run()
    assert exit_status == 0, stderr
    assert "done by an earlier run" in stderr
    assert f"ingine: {num_lines} outputs were cut by length (finish_reason: length)" in stderr
    assert files.ids() == ([f"line-{n:03}" for n in range(num_lines)], [])
    assert len(jobs) == num_lines


async def test_ctrl_c_says_how_to_go_on(command: Command, valkey: Server, keys: Keys, files: Files):
    files.write(*(request(n) for n in range(5)))
    async with valkey.connect() as redis:
        worker = FakeWorker(redis, keys)
        process = await command.start()
        await answer(worker, await worker.take())
        await wait_until_async(lambda: num_rows(files.output) == 1)
        process.send_signal(signal.SIGINT)
        _, said = await process.communicate()
    assert process.returncode == 130
    assert b"run the same command again to go on" in said
    assert b"Traceback" not in said
    assert len(files.rows()[0]) == 1


async def test_failed_lines_make_the_exit_status_1(command: Command, files: Files):
    files.write("not json")
    command.arguments.append("--json")
    exit_status, stdout, _ = await command.run()
    assert exit_status == 1
    assert json.loads(stdout) == {"num_lines": 1, "num_failed": 1, "num_resumed": 0, "num_cut": 0}


async def test_a_full_disk_is_one_clear_line(command: Command, files: Files):
    files.write(*("not json" for _ in range(100)))
    command.arguments = ["bash", "-c", f"ulimit -f 4; exec {shlex.join(command.arguments)}"]
    exit_status, _, stderr = await command.run()
    assert exit_status == 1
    assert "err.jsonl: File too large" in stderr
    assert "Traceback" not in stderr
    assert 0 < len(files.rows()[1]) < 100
