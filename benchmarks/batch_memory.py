"""Measures the memory of a long batch: `python benchmarks/batch_memory.py [--num-lines 1000000]`.

A client without a server answers each line at once, so what grows is the batch's own. Three runs on the same
files, each in a process of its own: `all` begins with empty files, `half` finds rows for one half of the
lines, `none` finds rows for all of them.
"""

import argparse
import asyncio
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from ingine.contract.record import JobStatus
from ingine.producer.batch import Batch
from ingine.producer.batch_input import InputFile
from ingine.producer.results import Choice, Result

RUNS = ("all", "half", "none")
WINDOW = 256
USAGE = {"num_prompt_tokens": 40, "num_cached_tokens": 16, "num_output_tokens": 4}


class AnsweringClient:
    """A client whose jobs are finished at once."""

    async def submit(self, *, job_id: str, **_) -> "Answer":
        return Answer(job_id)


class Answer:
    def __init__(self, job_id: str):
        self._job_id = job_id

    async def result(self) -> Result:
        await asyncio.sleep(0)
        choice = Choice(0, " an answer", [1, 2, 3, 4], "stop")
        fields = (self._job_id, choice.text, choice.token_ids, "stop", USAGE, {}, None, JobStatus.FINISHED)
        return Result(*fields, choices=[choice])


class Growth:
    """Progress that prints the memory of the process now and then."""

    def __init__(self) -> None:
        self._num_done, self._every, self._started_at = 0, 1, time.monotonic()

    def start(self, total: int, num_done: int, num_failed: int) -> None:
        self._num_done, self._every = num_done, max(1, total // 4)
        self._report("surveyed")

    def advance(self, **_) -> None:
        self._num_done += 1
        if self._num_done % self._every == 0:
            self._report(f"{self._num_done} rows")

    def _report(self, what: str) -> None:
        took_s = time.monotonic() - self._started_at
        print(f"  {what:>16}: {_resident_mib():7.1f} MiB after {took_s:.0f} s", flush=True)


def _resident_mib() -> float:
    num_pages = int(Path("/proc/self/statm").read_text().split()[1])
    return num_pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _write_input(path: Path, num_lines: int) -> None:
    with path.open("w") as file:
        for number in range(num_lines):
            body = {"model": "m", "prompt": f"Summarise document number {number}.", "max_tokens": 4}
            line = {"custom_id": f"request-{number:09d}", "method": "POST", "url": "/v1/completions"}
            file.write(json.dumps(line | {"body": body}) + "\n")


def _drop_half(path: Path) -> None:
    with path.open("rb") as file:
        num_lines = sum(1 for _ in file)
    with path.open("rb+") as file:
        for _ in range(num_lines // 2):
            file.readline()
        file.truncate(file.tell())


async def _run(folder: Path) -> None:
    paths = (folder / name for name in ("out.jsonl", "err.jsonl"))
    print(f"  {'started':>16}: {_resident_mib():7.1f} MiB", flush=True)
    summary = await Batch(
        AnsweringClient(), InputFile(folder / "in.jsonl"), *paths, progress=Growth(), window=WINDOW
    ).run()
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    resumed = f"{summary.num_lines} lines, {summary.num_resumed} of them resumed"
    print(f"  {'peak':>16}: {peak_mib:7.1f} MiB; {resumed}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num-lines", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        asyncio.run(_run(arguments.folder))
        return
    with TemporaryDirectory() as name:
        folder = Path(name)
        _write_input(folder / "in.jsonl", arguments.num_lines)
        for run in RUNS:
            if run == "half":
                _drop_half(folder / "out.jsonl")
            print(f"{run}:", flush=True)
            subprocess.run([sys.executable, __file__, "--folder", name], check=True)


if __name__ == "__main__":
    main()
