"""Checks the lines of a batch without a server."""

from collections.abc import Iterator
from dataclasses import dataclass

from ingine.contract.keys import Priority
from ingine.errors import InvalidJob
from ingine.producer.batch_input import InputFile
from ingine.producer.openai.batch_format import Line
from ingine.producer.submission import build_submission


@dataclass(frozen=True, slots=True)
class Fault:
    """Why one line would be refused."""

    line: int
    """Counted from 1, blank lines included."""
    custom_id: str | None
    code: str
    param: str | None
    message: str
    """Begins with the number of the line."""


def validate(input_file: InputFile) -> Iterator[Fault | None]:
    """Check all lines as a run does before it submits them. Yields None for each line without a fault.

    Only a worker knows its model's name, length, chat template and grammars, and only the server its limits:
    a line without a fault may still fail. Raises ConfigError if the file cannot be read.
    """
    for line in input_file.lines():
        yield _fault(line)


def _fault(line: Line) -> Fault | None:
    error: Exception | None = line.refusal
    if error is None:
        try:
            build_submission(**line.arguments, job_id=line.job_id, priority=Priority.LOW, stream=False)
            return None
        except InvalidJob as invalid:
            error = invalid
    message = str(error) if line.refusal else f"line {line.number}: {error}"
    return Fault(line.number, line.custom_id, str(error.code), getattr(error, "param", None), message)
