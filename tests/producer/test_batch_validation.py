"""`ingine batch --validate`: every fault is printed, and nothing is submitted."""

import json
from pathlib import Path

import pytest

from ingine.producer import ConfigError
from ingine.producer.batch_input import InputFile
from ingine.producer.batch_validation import Fault, validate
from tests.producer.conftest import start
from tests.producer.test_batch import Files, request


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


def faults(files: Files) -> list[Fault]:
    return [fault for fault in validate(InputFile(files.input)) if fault]


def test_every_fault_has_its_line_and_code(files: Files):
    files.write(
        request(0), "", "not json", request(0), request(1, best_of=2), request(2, top_p=7), request(3)
    )
    found = faults(files)
    assert [(fault.line, fault.custom_id, fault.code) for fault in found] == [
        (3, None, "invalid_json"),
        (4, "line-000", "duplicate_custom_id"),
        (5, "line-001", "unsupported_parameter"),
        (6, "line-002", "invalid_parameter"),
    ]
    assert all(fault.message.startswith(f"line {fault.line}: ") for fault in found)
    assert len(list(validate(InputFile(files.input)))) == 6


def test_a_file_that_is_not_there(files: Files):
    with pytest.raises(ConfigError, match=r"in.jsonl is not a file"):
        InputFile(files.input)


async def validated(files: Files, *options: str) -> tuple[int, str, str]:
    """Run the command with a server that cannot be reached."""
    nowhere = ("--redis-url", "redis://127.0.0.1:1")
    process = await start("batch", str(files.input), "--validate", *nowhere, *options)
    stdout, stderr = await process.communicate()
    return process.returncode, stdout.decode(), stderr.decode()


async def test_the_command_needs_no_server_and_writes_no_file(files: Files):
    files.write(request(0), request(1))
    assert await validated(files) == (0, "0 of 2 lines are invalid\n", "")
    files.write(request(0), "not json", request(1, top_p=7))
    exit_status, stdout, stderr = await validated(files)
    assert (exit_status, stderr) == (1, "")
    first, second, summary = stdout.splitlines()
    assert first.startswith("line 2: not JSON")
    assert second.startswith("line 3: ") and "top_p" in second
    assert summary == "2 of 3 lines are invalid"
    assert [path.name for path in files.input.parent.iterdir()] == ["in.jsonl"]


async def test_faults_as_json(files: Files):
    files.write(request(0), request(1, best_of=2))
    exit_status, stdout, _ = await validated(files, "--json")
    fault, summary = map(json.loads, stdout.splitlines())
    assert exit_status == 1
    assert fault == {
        "line": 2,
        "custom_id": "line-001",
        "code": "unsupported_parameter",
        "param": "best_of",
        "message": "line 2: best_of is not supported",
    }
    assert summary == {"num_lines": 2, "num_invalid": 1}


async def test_a_run_needs_a_file_for_the_results(files: Files):
    files.write(request(0))
    process = await start("batch", str(files.input))
    _, stderr = await process.communicate()
    assert process.returncode == 2
    assert b"--output" in stderr
