"""Runs a file of requests through the queue, with a bounded number in flight and a row for every line.

A line's digest (of custom_id, url, body and model) names both its row and its job. So a run that was killed
can be resumed without any other state: a line that has a row is done, and a job that the earlier run has
submitted is found under the same id instead of being run twice.
"""

import asyncio
import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Protocol

from ingine.contract.keys import Priority
from ingine.errors import (
    BadRecord,
    ConfigError,
    DuplicateJob,
    InvalidJob,
    JobCancelled,
    JobExpired,
    JobFailed,
    JobNotFound,
    QueueFull,
    RateLimited,
    UnknownStatus,
)
from ingine.producer.batch_ids import IdSet
from ingine.producer.batch_input import STANDARD, InputFile
from ingine.producer.batch_order import group_by_prefix
from ingine.producer.batch_outputs import open_rows
from ingine.producer.client import AsyncClient
from ingine.producer.handle import AsyncJobHandle
from ingine.producer.openai.batch_format import Line, error_row, is_cut, output_row
from ingine.producer.openai.requests import RequestRefused
from ingine.producer.results import Result

MAX_FULL_QUEUE_WAIT_S = 5.0
MAX_LOST = 10
"""Lost jobs of one line in one run, after which it gives up: something keeps removing them."""
_LINE_ERRORS = (RequestRefused, InvalidJob, JobFailed, JobCancelled, JobExpired, BadRecord)
_ENDED_OTHERWISE = (JobFailed, JobCancelled, JobExpired, BadRecord)


class Progress(Protocol):
    """Receives a batch's progress."""

    def start(self, total: int, num_done: int, num_failed: int) -> None:
        """Begin. `num_done` of `total` lines have a row of an earlier run; `num_failed` of these failed."""

    def advance(
        self, *, failed: bool, ran: bool, num_prompt_tokens: int = 0, num_cached_tokens: int = 0
    ) -> None:
        """Count one more row. ran: the line was submitted, and not refused by this client.
        num_cached_tokens: prompt tokens that the worker's prefix cache had.
        """


@dataclass(frozen=True, slots=True)
class BatchSummary:
    num_lines: int
    num_failed: int
    """Lines of the error file, including those of earlier runs."""
    num_resumed: int
    """Lines that earlier runs completed."""
    num_cut: int
    """Rows of the output file whose finish_reason is `length`, including those of earlier runs."""


class Batch:
    """Runs one input file into an output and an error file.

    Once `run` returns, output lines + error lines = input lines (blank ones apart). A line with a row in
    either file is not run again, unless `retry_errors` is set.
    """

    def __init__(
        self,
        client: AsyncClient,
        input_file: InputFile,
        output_path: Path,
        error_path: Path,
        *,
        progress: Progress,
        window: int,
        retry_errors: bool = False,
        ordered: bool = False,
    ):
        """output_path, error_path: files, or `-` for standard output, which can be both. A later run does not
        know of rows that went there. window: lines in flight at once.
        ordered: write rows in the order of the input. At most `window` lines are in flight or wait for an
        earlier line's row, so a slow line holds up later ones.
        retry_errors: empty the error file first, so that its lines run again. If this run is interrupted, the
        next one continues without it; with it, lines that have failed again meanwhile are retried once more.

        Raises ConfigError for files that cannot be used, and for `ordered` with `retry_errors`.
        """
        paths = [path.resolve() for path in (input_file.path, output_path, error_path) if path != STANDARD]
        if len(set(paths)) < len(paths):
            raise ConfigError("input, output and error file must be three different files")
        self._client, self._progress = client, progress
        if ordered and retry_errors:
            raise ConfigError("retried lines come after all others: they cannot be retried in order")
        self._retry_errors, self._ordered = retry_errors, ordered
        self._input = input_file
        self._output_path, self._error_path = output_path, error_path
        self._slots = asyncio.Semaphore(window)
        self._num_failed = self._num_cut = 0
        self._unknown: list[UnknownStatus] = []

    async def run(self) -> BatchSummary:
        """Run all lines that have no row yet. After any error or cancellation, another run continues.

        Raises ConfigError (files that cannot be used, or do not belong together), WriteFailed,
        ServerUnavailable and JobNotFound (the server loses a line's job again and again). Raises
        UnknownStatus, once all other lines have rows, if jobs ended in a way that only a newer version
        understands.
        """
        with open_rows(self._output_path) as self._output, open_rows(self._error_path) as self._errors:
            done, failed, num_lines = self._survey()
            num_resumed = len(done) + len(failed)
            self._progress.start(num_lines, num_resumed, self._num_failed)
            try:
                async with asyncio.TaskGroup() as group:
                    before = None
                    for line in self._lines_without(done, failed):
                        await self._slots.acquire()
                        written = asyncio.Event()
                        group.create_task(self._run_line(line, before, written))
                        before = written if self._ordered else None
            except ExceptionGroup as errors:  # the first error has stopped all lines
                raise errors.exceptions[0] from None
            if self._unknown:
                num, have = len(self._unknown), "line has" if len(self._unknown) == 1 else "lines have"
                raise UnknownStatus(f"{num} {have} no row, until this is run again: {self._unknown[0]}")
            return BatchSummary(num_lines, self._num_failed, num_resumed, self._num_cut)

    def _lines_without(self, *row_ids: IdSet) -> Iterator[Line]:
        """The lines that have no row, in the order in which they are to be submitted."""
        lines = (line for line in self._input.lines() if not any(line.row_id in ids for ids in row_ids))
        return lines if self._ordered else group_by_prefix(lines)

    def _survey(self) -> tuple[IdSet, IdSet, int]:
        """Row ids in the output and in the error file, and the number of all lines.

        Raises ConfigError if a row belongs to no line of this input: the counts could never add up.
        """
        done, failed = IdSet(), IdSet()
        for row in self._output.rows():
            done.add(row["id"])
            self._num_cut += is_cut(row)
        for row in self._errors.rows():
            failed.add(row["id"])
            self._num_failed += 1
        num_lines = num_with_row = 0
        for line in self._input.lines():
            num_lines += 1
            num_with_row += (line.row_id in done) + (line.row_id in failed)
        if num_with_row < len(done) + len(failed):
            self._refuse_foreign_row()
        if self._retry_errors:  # only now, when all rows are known to be of this batch
            self._errors.clear()
            self._num_failed, failed = 0, IdSet()
        return done, failed, num_lines

    def _refuse_foreign_row(self) -> None:
        """Raise ConfigError for the first row that belongs to no line."""
        row_ids = IdSet()
        for line in self._input.lines():
            row_ids.add(line.row_id)
        for file in (self._output, self._errors):
            for row in file.rows():
                if row["id"] not in row_ids:
                    raise ConfigError(
                        f"{file.path} has a row for custom_id {row['custom_id']!r} that answers no line of "
                        f"{self._input.path}: the line or --model has changed since, or the files are of "
                        "another batch. Remove the row to run that line again, or name other files"
                    )

    async def _run_line(self, line: Line, before: asyncio.Event | None, written: asyncio.Event) -> None:
        """Run one line and write its row. before: set once the row that precedes this one is written."""
        row, file, usage = None, self._output, {}
        try:
            if line.refusal:
                raise line.refusal
            result = await self._result(line)
            row, usage = output_row(line, result), result.usage
            self._num_cut += is_cut(row)
        except UnknownStatus as error:
            self._unknown.append(error)
        except _LINE_ERRORS as error:
            row, file = error_row(line, error), self._errors
            self._num_failed += 1
        if before:
            await before.wait()
        if row:
            file.write(row)
            self._progress.advance(
                failed=file is self._errors,
                ran=line.refusal is None,
                num_prompt_tokens=usage.get("num_prompt_tokens", 0),
                num_cached_tokens=usage.get("num_cached_tokens", 0),
            )
        written.set()
        self._slots.release()  # only now: rows that wait for their turn count as in flight, too

    async def _result(self, line: Line) -> Result:
        num_lost = 0
        for attempt in count():
            job_id = f"{line.job_id}.{attempt}" if attempt else line.job_id
            try:
                job, ours = await self._submit(line, job_id), True
            except DuplicateJob:
                job, ours = self._client.attach(job_id), False
            try:
                return await job.result()
            except JobNotFound:  # its result expired before it was read, or the server has lost it
                num_lost += 1
                if num_lost == MAX_LOST:
                    raise JobNotFound(
                        f"the server has lost {MAX_LOST} jobs of the line {line.custom_id!r}, one after the "
                        "other: look at its maxmemory-policy and at the workers' result TTL"
                    ) from None
            except UnknownStatus:  # even for an earlier run's job, which may have an output
                raise
            except _ENDED_OTHERWISE:
                if ours:
                    raise
                # An earlier run's job failed, and the line is retried.
        raise AssertionError("unreachable")

    async def _submit(self, line: Line, job_id: str) -> AsyncJobHandle:
        """Submit a job, waiting while the queue is full or the tenant is over its rate."""
        wait_s = 0.1
        while True:
            try:
                return await self._client.submit(
                    **line.arguments, job_id=job_id, priority=Priority.LOW, stream=False
                )
            except (QueueFull, RateLimited):
                await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))
                wait_s = min(2 * wait_s, MAX_FULL_QUEUE_WAIT_S)
