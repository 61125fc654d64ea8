"""A batch from standard input, and onto standard output."""

import asyncio
import json
import sys
from pathlib import Path

import pytest

from ingine.contract.keys import Keys
from ingine.producer import ConfigError
from ingine.producer.batch_input import STANDARD
from ingine.producer.batch_outputs import StandardOutput, default_error_path
from tests.producer.conftest import Server, start
from tests.producer.fake_worker import FakeWorker
from tests.producer.test_batch import Files, request, serving


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
async def piped(valkey: Server, keys: Keys, where: list[str]):
    """`await piped(stdin, "-", "-o", "-")` runs `ingine batch` with a worker, and counts its jobs."""

    async def run(stdin: bytes, *arguments: str) -> tuple[int, bytes, str, int]:
        async with valkey.connect() as redis, serving(FakeWorker(redis, keys)) as jobs:
            process = await start("batch", *arguments, *where)
            stdout, stderr = await process.communicate(stdin)
        return process.returncode, stdout, stderr.decode(), len(jobs)

    return run


async def test_a_batch_in_a_pipe(piped, files: Files):
    files.write(*(request(n) for n in range(10)), "not json", request(10, prompt="fail"))
    exit_status, stdout, stderr, num_jobs = await piped(files.input.read_bytes(), "-", "-o", "-", "--ordered")
    assert (exit_status, num_jobs) == (1, 11)
    rows = [json.loads(line) for line in stdout.splitlines()]
    assert [row["custom_id"] for row in rows] == [*(f"line-{n:03}" for n in range(10)), None, "line-010"]
    assert [row["response"]["status_code"] for row in rows] == [*[200] * 10, 400, 400]
    assert "10 of 12 lines on standard output, 2 on standard output" in stderr


async def test_a_pipe_that_is_fed_again_prints_all_rows_again_and_runs_no_job_again(piped, files: Files):
    files.write(*(request(n) for n in range(5)))
    first = await piped(files.input.read_bytes(), "-", "-o", "-", "--ordered", "--json")
    again = await piped(files.input.read_bytes(), "-", "-o", "-", "--ordered", "--json")
    assert (first[0], again[0]) == (0, 0)
    assert (first[3], again[3]) == (5, 0)
    texts = [
        [json.loads(row)["response"]["body"]["choices"] for row in stdout.splitlines()]
        for _, stdout, _, _ in (first, again)
    ]
    assert texts[0] == texts[1]
    assert json.loads(first[2].splitlines()[-2])["num_lines"] == 5


async def test_standard_input_and_a_file_are_resumed(piped, files: Files):
    files.write(request(0), request(1))
    options = ("-", "-o", str(files.output), "--errors", str(files.errors))
    assert (await piped(files.input.read_bytes(), *options))[3] == 2
    files.write(request(0), request(1), request(2))
    exit_status, _, stderr, num_jobs = await piped(files.input.read_bytes(), *options)
    assert (exit_status, num_jobs) == (0, 1)
    assert "3 lines, 2 done by an earlier run" in stderr
    assert files.ids() == (["line-000", "line-001", "line-002"], [])


async def test_a_reader_that_goes_away_is_one_clear_line(valkey: Server, keys: Keys, where, files: Files):
    files.write(*(request(n) for n in range(50)))
    async with valkey.connect() as redis, serving(FakeWorker(redis, keys)):
        command = '"$@" | head -n 1; exit "${PIPESTATUS[0]}"'
        process = await asyncio.create_subprocess_exec(
            *(
                "bash",
                "-c",
                command,
                "bash",
                sys.executable,
                "-m",
                "ingine.cli.main",
                "batch",
                str(files.input),
            ),
            *("-o", "-", "--window", "2", *where),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        stdout, stderr = await process.communicate()
    assert process.returncode == 1
    assert len(stdout.splitlines()) == 1
    assert b"cannot write to standard output: Broken pipe" in stderr
    assert b"Traceback" not in stderr


def test_rows_on_standard_output_cannot_be_retried():
    assert list(StandardOutput().rows()) == []
    with pytest.raises(ConfigError, match="name a file with --errors"):
        StandardOutput().clear()


def test_error_rows_go_beside_the_output():
    assert default_error_path(Path("a/out.jsonl")) == Path("a/out.errors.jsonl")
    assert default_error_path(STANDARD) == STANDARD
