"""Compressed files of a batch: the same rows, the same resumption."""

import gzip
import json
import signal
from pathlib import Path

import pytest

from ingine.contract.jobs import Job
from ingine.contract.keys import Keys
from ingine.producer import AsyncClient, ConfigError
from ingine.producer import compression as formats
from ingine.producer.batch_compressed import CompressedRowFile
from ingine.producer.batch_input import InputFile
from ingine.producer.batch_outputs import default_error_path, open_rows
from tests.producer.conftest import Server
from tests.producer.fake_worker import FakeWorker
from tests.producer.test_batch import Files, answer, batch_command, num_rows, request, run, serving
from tests.waiting import wait_until_async

SUFFIXES = [".gz", pytest.param(".zst", marks=pytest.mark.skipif(not formats.zstd, reason="Python 3.14"))]


class CompressedFiles(Files):
    def __init__(self, folder: Path, suffix: str = ".gz"):
        names = ("in.jsonl", "out.jsonl", "err.jsonl")
        self.folder = folder
        self.input, self.output, self.errors = (folder / f"{name}{suffix}" for name in names)
        self.partial = self.output.with_name(f"{self.output.name}.partial")

    def write(self, *lines: str | dict) -> None:
        texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
        with formats.open_file(self.input, "wb") as file:
            file.write("".join(f"{text}\n" for text in texts).encode())

    def rows(self) -> tuple[list[dict], list[dict]]:
        found = []
        for path in (self.output, self.errors):
            with formats.open_file(path) as file:
                found.append([json.loads(line) for line in file])
        return found[0], found[1]

    def names(self) -> set[str]:
        return {path.name for path in self.folder.iterdir()}


@pytest.fixture
def files(tmp_path: Path) -> CompressedFiles:
    return CompressedFiles(tmp_path)


@pytest.mark.parametrize("suffix", SUFFIXES)
async def test_a_compressed_batch(client: AsyncClient, worker: FakeWorker, tmp_path: Path, suffix: str):
    files = CompressedFiles(tmp_path, suffix)
    files.write(request(0), "not json", request(1))
    async with serving(worker):
        first = await run(client, files)
        rows = files.rows()
        again = await run(client, files)
    assert (first.num_lines, first.num_failed, first.num_resumed) == (3, 1, 0)
    assert (again.num_lines, again.num_failed, again.num_resumed) == (3, 1, 3)
    assert files.ids() == (["line-000", "line-001"], ["None"])
    assert files.rows() == rows
    assert files.names() == {f"{name}.jsonl{suffix}" for name in ("in", "out", "err")}


async def test_a_run_that_is_killed_is_resumed_from_the_partial_file(
    files: CompressedFiles, valkey: Server, queue: str, keys: Keys
):
    files.write(*(request(n) for n in range(20)))
    command = batch_command(files, valkey, queue)
    num_allowed = 6

    async def answer_some(worker: FakeWorker, job: Job) -> None:
        await wait_until_async(lambda: len(jobs) <= num_allowed)
        await answer(worker, job)

    async with valkey.connect() as redis, serving(FakeWorker(redis, keys), answer_some) as jobs:
        process = await command.start()
        await wait_until_async(lambda: num_rows(files.partial) == 6)
        process.kill()
        assert await process.wait() == -signal.SIGKILL
        assert not files.output.exists()
        num_allowed = 20
        exit_status, _, stderr = await command.run()
    assert exit_status == 0, stderr
    assert "6 done by an earlier run" in stderr
    assert files.ids() == ([f"line-{n:03}" for n in range(20)], [])
    assert len(jobs) == 20
    assert files.names() == {"in.jsonl.gz", "out.jsonl.gz", "err.jsonl.gz"}


async def test_a_run_can_be_killed_between_any_two_changes_of_the_files(
    client: AsyncClient, worker: FakeWorker, files: CompressedFiles
):
    files.write(request(0), request(1))
    ids = (["line-000", "line-001"], [])
    async with serving(worker) as jobs:
        await run(client, files)
        files.partial.touch()  # opened, and nothing decompressed
        await run(client, files)
        assert files.ids() == ids
        files.partial.touch()
        half = files.partial.with_name(f"{files.partial.name}.new")
        half.write_bytes(b'{"id": "half of a decompressed')
        await run(client, files)
        assert files.ids() == ids
        files.partial.write_bytes(gzip.decompress(files.output.read_bytes()))  # compressed, and not removed
        await run(client, files)
        assert files.ids() == ids
        files.partial.write_bytes(gzip.decompress(files.output.read_bytes()))
        files.output.unlink()  # complete, and not compressed
        await run(client, files)
        assert files.ids() == ids
    assert len(jobs) == 2
    assert files.names() == {"in.jsonl.gz", "out.jsonl.gz", "err.jsonl.gz"}


def test_rows_that_were_cleared_do_not_come_back(tmp_path: Path):
    """The process is killed after it has cleared the errors, and before it has written any."""
    path = tmp_path / "err.jsonl.gz"
    with CompressedRowFile(path) as file:
        file.write({"id": "1", "custom_id": "a"})
    killed = CompressedRowFile(path)
    assert [row["id"] for row in killed.rows()] == ["1"]
    killed.clear()
    killed.close()
    with CompressedRowFile(path) as file:
        assert list(file.rows()) == []


def test_an_interrupted_run_leaves_the_compressed_file_alone(tmp_path: Path):
    path = tmp_path / "out.jsonl.gz"
    with CompressedRowFile(path) as file:
        file.write({"id": "1", "custom_id": "a"})
    before = path.read_bytes()
    with pytest.raises(InterruptedError), CompressedRowFile(path):
        raise InterruptedError
    assert [name.name for name in tmp_path.iterdir()] == ["out.jsonl.gz"]
    with pytest.raises(InterruptedError), CompressedRowFile(path) as file:
        file.write({"id": "2", "custom_id": "b"})
        raise InterruptedError
    assert path.read_bytes() == before
    with CompressedRowFile(path) as file:
        assert [row["id"] for row in file.rows()] == ["1", "2"]


def test_it_belongs_to_one_run(tmp_path: Path):
    path = tmp_path / "out.jsonl.gz"
    for _ in range(2):  # without and with rows of an earlier run
        with CompressedRowFile(path) as file:
            with pytest.raises(ConfigError, match="another run"):
                CompressedRowFile(path)
            file.write({"id": "1", "custom_id": "a"})


@pytest.mark.parametrize("damage", [lambda raw: b"no gzip", lambda raw: raw[:-10]], ids=["other", "cut"])
def test_a_damaged_file_is_one_clear_error(files: CompressedFiles, damage):
    files.write(*(request(n) for n in range(50)))
    files.input.write_bytes(damage(files.input.read_bytes()))
    with pytest.raises(ConfigError, match=r"cannot read .*in.jsonl.gz: "):
        list(InputFile(files.input).lines())
    files.output.write_bytes(files.input.read_bytes())
    with pytest.raises(ConfigError, match=r"cannot decompress .*out.jsonl.gz: "):
        open_rows(files.output)
    assert files.names() == {"in.jsonl.gz", "out.jsonl.gz"}


def test_zstd_without_a_python_that_has_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(formats, "zstd", None)
    (tmp_path / "in.jsonl.zst").touch()
    for use in (InputFile, open_rows):
        with pytest.raises(ConfigError, match=r"zstd needs Python 3.14 or later.*zstd -dc"):
            use(tmp_path / "in.jsonl.zst")


def test_error_rows_are_compressed_like_the_output():
    assert default_error_path(Path("a/out.jsonl.gz")) == Path("a/out.errors.jsonl.gz")
    assert default_error_path(Path("out.zst")) == Path("out.errors.zst")
