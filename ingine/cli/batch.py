"""`ingine batch`: runs a file of requests, or checks it."""

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ingine import producer
from ingine.cli.options import INTERRUPTED, AsJson, QueueName, RedisUrl, print_json
from ingine.terminal import echo

if TYPE_CHECKING:
    from ingine.producer.batch import BatchSummary

DEFAULT_WINDOW = 256


def batch(
    input_path: Annotated[
        Path,
        typer.Argument(metavar="INPUT", help="JSON lines in OpenAI's Batch format, or - for standard input."),
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File for results, one per line, or -.")
    ] = None,
    errors: Annotated[
        Path | None,
        typer.Option(help="File for failed lines, or -. Default: OUTPUT with .errors before its suffix."),
    ] = None,
    validate: Annotated[
        bool, typer.Option("--validate", help="Check all lines and print their faults. Submit nothing.")
    ] = False,
    retry_errors: Annotated[
        bool,
        typer.Option("--retry-errors", help="Empty the error file first, so that its lines run again."),
    ] = False,
    ordered: Annotated[
        bool,
        typer.Option("--ordered", help="Write rows in the order of INPUT. A slow line holds up later ones."),
    ] = False,
    window: Annotated[int, typer.Option(min=1, help="Lines in flight at once.")] = DEFAULT_WINDOW,
    model: Annotated[str | None, typer.Option(help="Override the model that the lines name.")] = None,
    as_json: AsJson = False,
    redis_url: RedisUrl = None,
    queue: QueueName = None,
) -> None:
    """Run a file of requests at low priority. They are for /v1/chat/completions or /v1/completions.

    Every line of the input gets a line in the output or the error file: an invalid line stops no other. If
    this is killed or interrupted, run it again to continue: without --retry-errors, unless the lines that
    have failed meanwhile are to be retried, too. Rows on standard output (-) are not known to the next run,
    which prints all of them again. A summary then goes to standard error. Files whose names end in .gz or
    .zst are compressed, output files at the end of a run: until then their rows are in OUTPUT.partial.

    Exit status: 0 all lines are in the output (with --validate: are valid), 1 some are in the error file (are
    invalid) or a file cannot be written, 2 wrong usage, 3 server unavailable.
    """
    if validate:
        _validate(input_path, model, as_json)
        return
    if output is None:
        raise typer.BadParameter("name a file for the results, or use --validate", param_hint="--output")
    import asyncio

    from ingine.cli.batch_progress import make_progress
    from ingine.producer.batch import Batch
    from ingine.producer.batch_input import STANDARD, InputFile
    from ingine.producer.batch_outputs import default_error_path

    errors = errors or default_error_path(output)
    prints_rows = STANDARD in (output, errors)
    input_file = InputFile(input_path, model=model)
    progress = make_progress()

    async def run() -> "BatchSummary":
        async with producer.AsyncClient(redis_url, queue=queue) as client:
            return await Batch(
                client,
                input_file,
                output,
                errors,
                progress=progress,
                window=window,
                retry_errors=retry_errors,
                ordered=ordered,
            ).run()

    try:
        summary = asyncio.run(run())
    except KeyboardInterrupt:
        again = "to go on" if not prints_rows else "to print all rows again"
        echo(f"ingine: interrupted; run the same command again {again}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    finally:
        progress.stop()
    if as_json:
        echo(json.dumps(dataclasses.asdict(summary)), err=prints_rows)
    else:
        num_ok, num_lines = summary.num_lines - summary.num_failed, summary.num_lines
        where = "on standard output" if output == STANDARD else f"in {output}"
        where_failed = "on standard output" if errors == STANDARD else f"in {errors}"
        echo(f"{num_ok} of {num_lines} lines {where}, {summary.num_failed} {where_failed}", err=prints_rows)
    if summary.num_cut:
        echo(f"ingine: {summary.num_cut} outputs were cut by length (finish_reason: length)", err=True)
    if summary.num_failed:
        raise typer.Exit(1)


def _validate(input_path: Path, model: str | None, as_json: bool) -> None:
    """Print each fault as it is found, and a summary behind them. Exits with 1 if there is a fault."""
    from ingine.producer.batch_input import InputFile
    from ingine.producer.batch_validation import validate

    num_lines = num_invalid = 0
    for fault in validate(InputFile(input_path, model=model)):
        num_lines += 1
        if fault:
            num_invalid += 1
            if as_json:
                print_json(dataclasses.asdict(fault))
            else:
                echo(fault.message)
    if as_json:
        print_json({"num_lines": num_lines, "num_invalid": num_invalid})
    else:
        echo(f"{num_invalid} of {num_lines} lines are invalid")
    if num_invalid:
        raise typer.Exit(1)
